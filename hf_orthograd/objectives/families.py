"""How the losses of transformers' model classes split over samples.

A model returns one loss, the mean over all unmasked tokens of the batch. Here each sample has its own: the mean over its
tokens. The retain mean is the mean over samples, which differs from the mean over tokens where lengths differ: every sample
counts the same, however long.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput


IGNORED_LABEL = -100


def token_losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each sample, the mean over its tokens, in nats.

    Args:
        logits (`torch.Tensor`): Shape (B, T, V).
        labels (`torch.Tensor`): Shape (B, T); positions at -100 do not count.

    Returns:
        `torch.Tensor` of shape (B,), float32.
    """
    labels = labels.to(logits.device)
    losses = losses_at_positions(logits, labels, label_smoothing)
    return losses.sum(dim=1) / (labels != IGNORED_LABEL).sum(dim=1)


def losses_at_positions(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy at each position, in nats, shape (B, T), 0 where the label is -100; arguments as [`token_losses`]."""
    # classes last: softmax over another dimension than the last reads memory in strides
    losses = F.cross_entropy(
        logits.float().flatten(0, 1),
        labels.flatten(),
        reduction="none",
        ignore_index=IGNORED_LABEL,
        label_smoothing=label_smoothing,
    )
    return losses.view(labels.shape)


def kl_divergence(logits: Tensor, start_logits: Tensor, counted: Tensor) -> Tensor:
    """KL(start || model) of each sample, in nats, shape (B,): the mean over the positions that count.

    Args:
        logits, start_logits (`torch.Tensor`): Shape (B, T, V).
        counted (`torch.Tensor`): Shape (B, T), True where a position counts.
    """
    start = start_logits.float().log_softmax(-1)
    divergence = F.kl_div(logits.float().log_softmax(-1), start, reduction="none", log_target=True).sum(-1)
    return mean_where(divergence, counted)


def mean_where(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of each sample over the positions that count; both (B, T)."""
    return (values * counted).sum(1) / counted.sum(1)


class Family:
    """How the loss of some model classes splits over samples.

    Attributes:
        label_names (`tuple[str]`): What a batch must hold.
        shifts_labels (`bool`): Whether position t predicts label t + 1, so that the first label is never predicted.
    """

    label_names = ("labels",)
    shifts_labels = False

    def losses(self, outputs: ModelOutput, inputs: Mapping, model: nn.Module) -> Tensor:
        """Shape (B,); for a single sample what the model itself computes."""
        return token_losses(*self.positions(outputs, inputs, model))

    def positions(self, outputs: ModelOutput, inputs: Mapping, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) beside the labels (B, T) that they predict, -100 where none counts.

        Raises:
            ValueError: Labels belong to no positions.
        """
        raise ValueError(
            f"{type(model).__name__}'s loss here is not one of positions with a label each, which this method needs."
        )

    def counted(self, inputs: Mapping) -> Tensor | None:
        """Shape (B, L): at which of the last L positions of the logits a label counts; None where it is not so simple."""
        return None

    def divergences(
        self, outputs: ModelOutput, start_outputs: ModelOutput, inputs: Mapping, model: nn.Module
    ) -> Tensor:
        """How far predictions have gone from the starting model's, shape (B,): KL(start || model), in nats."""
        logits, labels = self.positions(outputs, inputs, model)
        start_logits, _ = self.positions(start_outputs, inputs, model)
        return kl_divergence(logits, start_logits, labels != IGNORED_LABEL)

    def num_classes(self, config: PreTrainedConfig) -> int | None:
        """How many values a label may have, where the configuration says."""
        return getattr(config.get_text_config(decoder=True), "vocab_size", None)

    def ignored_label(self, config: PreTrainedConfig) -> int:
        """The label of a position that does not count."""
        return IGNORED_LABEL


class AlignedTokens(Family):
    """Encoder-decoder models, masked language models and token classifiers: position t predicts label t."""

    def positions(self, outputs: ModelOutput, inputs: Mapping, model: nn.Module) -> tuple[Tensor, Tensor]:
        return outputs.logits, inputs["labels"]

    def counted(self, inputs: Mapping) -> Tensor:
        return inputs["labels"] != IGNORED_LABEL


def without_unpredicted(inputs: Mapping) -> dict:
    """A batch of a causal language model, without labels that padding on the left would predict: a text's first token."""
    labels, mask = inputs["labels"], inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != labels.shape:
        return dict(inputs)
    is_read = F.pad(mask[:, :-1].bool(), (1, 0), value=True)
    return {**inputs, "labels": torch.where(is_read, labels, IGNORED_LABEL)}


class CausalTokens(Family):
    """Causal language models: position t predicts label t + 1. Before the text there may be tokens of an image or a prompt."""

    shifts_labels = True

    def losses(self, outputs: ModelOutput, inputs: Mapping, model: nn.Module) -> Tensor:
        smoothing = getattr(model.config.get_text_config(decoder=True), "label_smoothing", None)  # BLIP
        return token_losses(*self.positions(outputs, inputs, model), label_smoothing=smoothing or 0.0)

    def positions(self, outputs: ModelOutput, inputs: Mapping, model: nn.Module) -> tuple[Tensor, Tensor]:
        labels = self._shifted(inputs)
        return outputs.logits[:, -labels.shape[1] :], labels

    def counted(self, inputs: Mapping) -> Tensor:
        return self._shifted(inputs) != IGNORED_LABEL

    @staticmethod
    def _shifted(inputs: Mapping) -> Tensor:
        """The last position predicts nothing. Labels move, since logits that lose a position are copied."""
        return F.pad(without_unpredicted(inputs)["labels"][:, 1:], (0, 1), value=IGNORED_LABEL)


class ClassHead(Family):
    """Classifiers of whole samples: one class, several, or numbers, as `problem_type` and labels say."""

    @staticmethod
    def problem(labels: Tensor, config: PreTrainedConfig) -> str:
        """The model's own rule: without a `problem_type` one output is a regression, and floating labels are several."""
        if config.problem_type is not None:
            return config.problem_type
        if config.num_labels == 1:
            return "regression"
        return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"

    def losses(self, outputs: ModelOutput, inputs: Mapping, model: nn.Module) -> Tensor:
        logits, labels = outputs.logits.float(), inputs["labels"]
        problem = self.problem(labels, model.config)
        if problem == "single_label_classification":
            return F.cross_entropy(logits, labels, reduction="none")
        targets = labels.to(logits.dtype).reshape(logits.shape)
        measure = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
        return measure(logits, targets, reduction="none").mean(dim=1)

    def positions(self, outputs: ModelOutput, inputs: Mapping, model: nn.Module) -> tuple[Tensor, Tensor]:
        if self.problem(inputs["labels"], model.config) != "single_label_classification":
            return super().positions(outputs, inputs, model)
        return outputs.logits[:, None], inputs["labels"][:, None]

    def divergences(
        self, outputs: ModelOutput, start_outputs: ModelOutput, inputs: Mapping, model: nn.Module
    ) -> Tensor:
        problem = self.problem(inputs["labels"], model.config)
        if problem == "single_label_classification":
            return super().divergences(outputs, start_outputs, inputs, model)
        logits, start = outputs.logits.float(), start_outputs.logits.float()
        if problem == "regression":  # in the units of the loss: zero where no prediction has moved
            return (logits - start).square().mean(dim=1)
        # of several labels yes or no for each, whose logits are log-odds
        pairs = [torch.stack([value, torch.zeros_like(value)], dim=-1) for value in (logits, start)]
        return kl_divergence(*pairs, torch.ones_like(logits, dtype=torch.bool))

    def num_classes(self, config: PreTrainedConfig) -> int | None:
        return getattr(config, "num_labels", None)


class TokenClasses(AlignedTokens):
    """Token classifiers: a class for each token."""

    def num_classes(self, config: PreTrainedConfig) -> int | None:
        return config.num_labels


class Spans(Family):
    """Extractive question answering: where the answer starts and ends; outside the text, as after cutting, not counted."""

    label_names = ("start_positions", "end_positions")

    def losses(self, outputs: ModelOutput, inputs: Mapping, model: nn.Module) -> Tensor:
        return torch.stack([self._edge(*edge) for edge in self._edges(outputs, inputs)]).mean(dim=0)

    @staticmethod
    def _edges(outputs, inputs):
        for name in ("start", "end"):
            yield outputs[f"{name}_logits"].float(), inputs[f"{name}_positions"].reshape(-1)

    @staticmethod
    def _edge(logits: Tensor, positions: Tensor) -> Tensor:
        outside = logits.shape[1]
        return F.cross_entropy(logits, positions.clamp(0, outside), reduction="none", ignore_index=outside)

    def divergences(
        self, outputs: ModelOutput, start_outputs: ModelOutput, inputs: Mapping, model: nn.Module
    ) -> Tensor:
        edges = zip(self._edges(outputs, inputs), self._edges(start_outputs, inputs), strict=True)
        found = []
        for (logits, positions), (start_logits, _) in edges:
            counted = torch.ones_like(positions[:, None], dtype=torch.bool)
            found.append(kl_divergence(logits[:, None], start_logits[:, None], counted))
        return torch.stack(found).mean(dim=0)

    def num_classes(self, config: PreTrainedConfig) -> int | None:
        return None


class Pixels(Family):
    """Semantic segmentation: a class for each pixel, predicted on a coarser grid and interpolated, as the models do."""

    def positions(self, outputs: ModelOutput, inputs: Mapping, model: nn.Module) -> tuple[Tensor, Tensor]:
        labels = inputs["labels"]
        logits = F.interpolate(outputs.logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        labels = labels.masked_fill(labels == self.ignored_label(model.config), IGNORED_LABEL)
        return logits.flatten(2).transpose(1, 2), labels.flatten(1)

    def num_classes(self, config: PreTrainedConfig) -> int | None:
        return config.num_labels

    def ignored_label(self, config: PreTrainedConfig) -> int:
        return getattr(config, "semantic_loss_ignore_index", IGNORED_LABEL)


class Ctc(Family):
    """Connectionist temporal classification.

    Under `config.ctc_loss_reduction="mean"` each loss is divided by its number of labels, as torch does before it takes
    the mean; under "sum" it is the total, in nats.
    """

    def losses(self, outputs: ModelOutput, inputs: Mapping, model: nn.Module) -> Tensor:
        config, labels = model.config, inputs["labels"]
        present = labels >= 0
        frames = _num_frames(outputs, inputs, model)
        target_lengths = present.sum(dim=-1)
        # summed over thousands of alignments, float32 would leave an error of 3e-5 in the gradient
        log_probabilities = F.log_softmax(outputs.logits.double(), dim=-1).transpose(0, 1)
        # CUDA's own kernel for CTC is not deterministic
        with torch.backends.cudnn.flags(enabled=False):
            losses = F.ctc_loss(
                log_probabilities,
                labels.masked_select(present),
                frames,
                target_lengths,
                blank=config.pad_token_id,
                reduction="none",
                zero_infinity=config.ctc_zero_infinity,
            )
        losses = losses.float()
        return losses / target_lengths if config.ctc_loss_reduction == "mean" else losses

    def divergences(
        self, outputs: ModelOutput, start_outputs: ModelOutput, inputs: Mapping, model: nn.Module
    ) -> Tensor:
        logits, frames = outputs.logits, _num_frames(outputs, inputs, model)
        counted = torch.arange(logits.shape[1], device=logits.device) < frames[:, None]
        return kl_divergence(logits, start_outputs.logits, counted)


def _num_frames(outputs, inputs: Mapping, model: nn.Module) -> Tensor:
    """How many frames of logits each sample has, shape (B,), by the model's own count."""
    attention_mask, logits = inputs.get("attention_mask"), outputs.logits
    if attention_mask is None:
        return torch.full((len(logits),), logits.shape[1], dtype=torch.long, device=logits.device)
    lengths = attention_mask.sum(dim=-1)
    if hasattr(model, "_get_feat_extract_output_lengths"):  # Wav2Vec2 and its kin
        return model._get_feat_extract_output_lengths(lengths).long()
    encoder = getattr(model, "encoder", None)
    if hasattr(encoder, "_get_subsampling_output_length"):  # Parakeet, LASR
        return encoder._get_subsampling_output_length(lengths).long()
    raise ValueError(
        f"{type(model).__name__} does not say how many frames an utterance has under its `attention_mask`. Pass a "
        "`compute_loss_func` that returns one CTC loss for each sample, shape (batch size,)."
    )
