"""More retain samples than memory holds at once: the Gram matrix of all of them, from passes over a few at a time.

A chunk's inner products with the other chunks need their gradients side by side. So parameters are taken in groups whose
gradients (or factors) of *all* samples take no more memory than all parameters' would of three quarters of *one* chunk,
or than the model. For each group all samples run forward, a quarter of a chunk at a time, and backward as far as the
group reaches. Then all inner products of the group are taken at once. With n chunks there are about 4/3 n groups, and
as many passes over k samples, which is quadratic in k, and one more for the update. Where everything fits into one
group, as with an adapter, there is one pass in all, and whole chunks run forward.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...data import Batch
from ...objectives import PerSampleLosses
from ...projection import UpdateWeights
from ...trials import RandomState
from ..base import StepGradients, UnsupportedModelError
from ..products import own_memory


# what a config calls the token that stands for a piece of an image, a video or a sound
_PLACEHOLDERS = tuple(f"{kind}_token_{form}" for kind in ("image", "video", "audio") for form in ("id", "index"))


@dataclass
class Chunk(Batch):
    """Some of the retain samples of this process.

    Attributes:
        samples (`slice`): Their numbers.
        repeats (`bool`): Whether their forward pass may run more than once.
        random_state ([`RandomState`]): With which it started: repeated, it drops out the same.
    """

    samples: slice
    repeats: bool = False
    random_state: RandomState | None = None

    def losses(self, model: nn.Module, per_sample_losses: PerSampleLosses) -> Tensor:
        self._start()
        return super().losses(model, per_sample_losses)

    def losses_and_terms(
        self, model: nn.Module, per_sample_losses: PerSampleLosses, term: Callable | None
    ) -> tuple[Tensor, Tensor]:
        self._start()
        return super().losses_and_terms(model, per_sample_losses, term)

    def _start(self) -> None:
        if self.random_state is not None:
            self.random_state.restore()
        elif self.repeats:
            self.random_state = RandomState.now()

    @property
    def extent(self) -> int:
        """Numbers in its tensors: what tells a chunk of longer sequences from one of shorter."""
        return sum(value.numel() for value in self.inputs.values() if isinstance(value, Tensor))


def split_samples(batches: list[Batch], size: int | None) -> list[Chunk]:
    """Cuts batches along the first dimension of their tensors; inputs that are no tensors go to every chunk.

    Raises:
        ValueError: A batch is to be cut that holds a tensor whose first dimension does not run over the samples.
    """
    chunks, start = [], 0
    for batch in batches:
        for first in range(0, batch.size, size or batch.size):
            last = min(first + (size or batch.size), batch.size)
            inputs = batch.inputs if last - first == batch.size else _cut(batch, slice(first, last), size)
            rows = batch.rows if batch.rows is None else batch.rows[first:last]
            chunks.append(Chunk(inputs, last - first, slice(start + first, start + last), rows=rows))
        start += batch.size
    for chunk in chunks:
        chunk.repeats = len(chunks) > 1
    return chunks


def _cut(batch: Batch, samples: slice, size: int | None) -> dict:
    tensors = {name: value for name, value in batch.inputs.items() if isinstance(value, Tensor) and value.ndim}
    other = [name for name, value in tensors.items() if len(value) != batch.size]
    if other:
        raise ValueError(
            f"A batch of {batch.size} samples cannot be cut into chunks of {size}: the first dimension of "
            f"{', '.join(f'`{name}` {tuple(tensors[name].shape)}' for name in other)} does not run over the samples. Leave "
            "`retain_chunk_size` out, and lower `per_device_train_batch_size` or raise `gradient_accumulation_steps`."
        )
    return {**batch.inputs, **{name: value[samples] for name, value in tensors.items()}}


# what a config calls the token that stands for a piece of an image, a video or a sound
_PLACEHOLDERS = tuple(f"{kind}_token_{form}" for kind in ("image", "video", "audio") for form in ("id", "index"))


def image_tokens(model: nn.Module, trainable: Iterable[str]) -> set[int]:
    """Tokens that stand for pieces of an image, a video or a sound, if a vision tower, a projector or the like is trained; else none."""
    plain = extract_model_from_parallel(model, keep_torch_compile=False)
    config = getattr(plain, "config", None)
    tokens = {getattr(config, name, None) for name in _PLACEHOLDERS} - {None}
    return set() if not tokens or _text_parameters(plain).issuperset(trainable) else tokens


def check_images(batches: list[Batch], tokens: Iterable[int]) -> None:
    """Refuses samples with unequal numbers of the tokens that stand for pieces of an image.

    What reads images takes them, or their tiles or patches, in one row after another. Rows are taken to be of the samples
    in equal parts.

    Raises:
        UnsupportedModelError: The samples of a batch have unequal numbers.
    """
    for batch, token in product(batches, tokens):
        ids = batch.inputs.get("input_ids")
        counts = (ids == token).sum(dim=1) if isinstance(ids, Tensor) and ids.ndim == 2 else None
        if counts is not None and (counts != counts[0]).any():
            raise UnsupportedModelError(
                f"The samples of a batch have {counts.tolist()} image tokens: their images differ in number or size, and what the vision "
                "tower or the projector makes of them belongs to no sample by its place. Freeze both (as LoRA on the language "
                "model does), give each sample as many images of one size, or set `gradient_engine` to 'loop'."
            )


def _text_parameters(model: nn.Module) -> set[str]:
    """Those that read one row of each sample: the decoder's, adapters among them, and the head's."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        return set()
    parts = [part for part in (base.get_decoder(), base.get_output_embeddings()) if part is not None]
    ids = {id(parameter) for part in parts for parameter in part.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


@dataclass
class RepeatedGradients(StepGradients):
    """Inner products without any gradients: the update takes each chunk forward and backward once more.

    Attributes:
        losses_of (`Callable`): Maps a chunk to its losses and its retain terms.
        loss_scale (`float`): What both are multiplied by before they go backward.
        forget_gradients (`dict[str, torch.Tensor]`): `g_u` of each trainable parameter that the forget loss uses.
        chunks (`list[Chunk]`): The retain samples of this process.
    """

    retain_terms: Tensor | None  # again, as [`combine`] sets it: stubgen would give it a default
    losses_of: Callable[[Chunk], tuple[Tensor, Tensor]]
    loss_scale: float
    forget_gradients: dict[str, Tensor]
    chunks: list[Chunk]

    def combine(self, weights: UpdateWeights) -> Tensor:
        others, projected = self.parameters.others, self.parameters.projected
        terms = [(self.local_weights(weights, name), group) for name, group in weigh_groups(others, projected)]
        found = {name: gradient.mul_(weights.forget) for name, gradient in self.forget_gradients.items()}
        end, found_terms = RandomState.now(), []
        for chunk in self.chunks:
            losses, retain_terms = self.losses_of(chunk)
            found_terms.append(retain_terms.detach())
            for own_weights, parameters in terms:
                weighted = own_weights[chunk.samples].to(losses.dtype) @ losses
                if weights.retain_term:
                    weighted = weighted + self.term_weight(weights) / self.layout.total * retain_terms.sum()
                gradients = torch.autograd.grad(
                    self.loss_scale * weighted,
                    list(parameters.values()),
                    retain_graph=parameters is not terms[-1][1],
                    allow_unused=True,
                )
                for name, gradient in zip(parameters, own_memory(gradients), strict=True):
                    if gradient is not None:
                        found[name] = gradient if name not in found else found[name].add_(gradient)
        end.restore()
        self.retain_terms = torch.cat(found_terms) if weights.retain_term else None
        return self.hand_over(found)


def weigh_groups(
    others: dict[str, nn.Parameter], projected: dict[str, nn.Parameter]
) -> list[tuple[str | None, dict[str, nn.Parameter]]]:
    """The two groups of parameters that share their weights under a global projection, each with a name to look up."""
    groups = [(None, others), (next(iter(projected)), projected)]
    return [(name, group) for name, group in groups if group]
