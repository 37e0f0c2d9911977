"""Methods that train the forget set on wrong labels: random labels and SalUn."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..data import Batch
from ..objectives import IGNORED_LABEL
from ..trials import preserved_modes, preserved_random_state
from .base import BaselineTrainer, refuse_shards


logger = logging.get_logger(__name__)


class RandomLabelTrainer(BaselineTrainer):
    """Random labels (arXiv 2010.10981): trains on the retain set and on forget samples with labels that are wrong.

    Each label is drawn once from all others; with token labels, each position. A decoder reads the right ones before it. Samples
    have one class, or tokens. With `saliency` it is SalUn (arXiv 2310.12508, equations 3 and 5): only weights whose gradient of
    the forget loss, under the original model, is among the largest are trained. (Weight decay is not masked.)

    Args:
        saliency (`float`, *optional*): Share of the weights that is trained; the paper takes 0.5. All by default.

    Raises:
        ValueError: `saliency` out of (0, 1], or with it a sharded model, or a run that is resumed: its masks are of the original
            model. Or, from `train()`, labels that are no classes.
    """

    unread = ("alpha",)

    def __init__(self, *args: Any, saliency: float | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if saliency is not None and not 0 < saliency <= 1:
            raise ValueError(f"`saliency` must lie in (0, 1], but is {saliency}.")
        if saliency is not None and self.forget_dataset is not None:
            refuse_shards(self, "`saliency` masks weights by their whole gradients")
        self._saliency, self._masks, self._count = saliency, [], 0

    def forget_loss(self, model: nn.Module, batch: Batch) -> Tensor | None:
        inputs, labels = dict(batch.inputs), batch.inputs["labels"]
        plain = self.per_sample_loss.model
        if plain.config.is_encoder_decoder and labels.ndim == 2 and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = _shifted(labels, plain)
        inputs["labels"] = self._wrong(labels, batch.rows.tolist())
        return self.per_sample_loss(model, inputs).mean()

    def _wrong(self, labels: Tensor, rows: Sequence[int]) -> Tensor:
        """Other labels of the same shape, drawn on the host and moved in one piece."""
        count = self._count = self._count or self._classes()
        # by seed and row, so that a sample has one wrong label however often it comes, on any process
        generators = [torch.Generator().manual_seed(self.args.seed * 1_000_003 + row) for row in rows]
        drawn = torch.stack([torch.randint(1, count, labels.shape[1:], generator=one) for one in generators])
        ignored = labels == self.per_sample_loss.ignored_label
        if labels.ndim == 2:  # padding of either side takes none of the draws
            drawn = drawn.to(labels.device).gather(1, ((~ignored).cumsum(dim=1) - 1).clamp(min=0))
        left_out = self.per_sample_loss.blank  # of CTC, no class of its own
        places = labels if left_out is None else labels - (labels > left_out).to(labels.dtype)
        wrong = (places + drawn.to(labels.device)) % count
        if left_out is not None:
            wrong = wrong + (wrong >= left_out).to(wrong.dtype)
        return torch.where(ignored, labels, wrong)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        try:
            return super().train(*args, **kwargs)
        finally:  # what trains the model later, trains all of it
            self._remove_masks()

    def _remove_masks(self) -> None:
        for mask in self._masks:
            mask.remove()
        self._masks = []

    def begin_unlearning(self) -> None:
        super().begin_unlearning()
        self._count = self._classes()  # refused before the first step
        self._remove_masks()  # a run may begin again, with smaller batches
        if self._saliency is None:
            return
        if self.state.global_step > 0:
            raise ValueError(
                "A run with `saliency` cannot be resumed: its masks come from the gradients of the original model, and the "
                "checkpoint is of another. Start from the beginning."
            )
        plain = self.accelerator.unwrap_model(self.model)
        trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
        total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in trained]
        with preserved_modes(plain), preserved_random_state():
            plain.eval()
            for batch in self.batches_of("forget_dataset"):
                losses = batch.losses(plain, self.per_sample_loss)
                gradients = torch.autograd.grad(losses.sum(), trained, allow_unused=True)
                total = [t if g is None else t + g for t, g in zip(total, gradients, strict=True)]
        masks = saliency_masks(total, self._saliency)
        left = sum(mask.sum() for mask in masks).item() / sum(mask.numel() for mask in masks)
        if left < 0.99 * self._saliency:
            logger.warning(
                f"`saliency` is {self._saliency:g}, but {left:.1%} of the weights have a gradient at all on `forget_dataset`: the others stay. "
                "Of a fresh LoRA adapter these are its A matrices."
            )
        for parameter, mask in zip(trained, masks, strict=True):
            mask = mask.to(parameter.dtype)
            self._masks.append(parameter.register_hook(lambda gradient, mask=mask: gradient * mask))

    def _classes(self) -> int:
        """How many values a label may have."""
        labels, config = self.first_batch("forget_dataset", 1).inputs.get("labels"), self.per_sample_loss.model.config
        count = self.per_sample_loss.num_classes
        if count is None and labels is not None:  # with a loss of the user's own
            count = config.get_text_config().vocab_size if labels.ndim > 1 else config.num_labels
        kind = None if labels is None else self.per_sample_loss.problem(labels)
        if labels is None or labels.is_floating_point() or kind in ("regression", "multi_label_classification"):
            raise ValueError(
                f"{type(self).__name__} draws another class for each label, but those of {type(self.per_sample_loss.model).__name__} are "
                f"none: `labels` are {'missing' if labels is None else labels.dtype}, `problem_type` is {kind!r}. Use another method."
            )
        return count if self.per_sample_loss.blank is None else count - 1


def _shifted(labels: Tensor, model: nn.Module) -> Tensor:
    """What a decoder reads where it is to put the labels out: the right ones, though wrong ones are asked for."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    start, padding = model.config.decoder_start_token_id, model.config.pad_token_id
    if start is None or padding is None:
        raise ValueError(
            f"{type(model).__name__} makes its decoder's inputs from labels, but its configuration has no `decoder_start_token_id` or "
            "`pad_token_id` to make them of the right ones. Put `decoder_input_ids` into the batches."
        )
    read = torch.cat((labels.new_full((len(labels), 1), start), labels[:, :-1]), dim=1)  # as Whisper does within
    return read.masked_fill(read == IGNORED_LABEL, padding)


def saliency_masks(gradients: list[Tensor], share: float) -> list[Tensor]:
    """1 where the absolute gradient is among the largest `share` of all entries of all tensors, else 0; in the gradients' shapes."""
    magnitudes = torch.cat([gradient.abs().flatten() for gradient in gradients])
    kept = max(1, round(share * len(magnitudes)))
    threshold = magnitudes.kthvalue(len(magnitudes) - kept + 1).values
    # most gradients may be zero, as those of tokens that never come: these are never among the largest
    return [((gradient.abs() >= threshold) & (gradient != 0)).to(gradient.dtype) for gradient in gradients]
