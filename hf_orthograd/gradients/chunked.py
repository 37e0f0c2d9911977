"""More retain samples than memory holds: the Gram matrix of all of them, from passes over a few at a time.

A chunk's inner products with the other chunks need their gradients side by side. So parameters are taken in groups whose
gradients (or factors) of *all* samples take no more memory than all parameters' would of *one* chunk, or than the
model. For each group every chunk runs forward, and backward as far as the group reaches; then all inner products of the
group are taken at once. With n chunks there are about n groups: n passes over k samples, which is quadratic in k, and one more for the
update. Where everything fits into one group, as with an adapter, there is one pass in all.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import Parameters, PerSampleLosses, Slopes, StepGradients, known_gradients
from .gram import GramEngine, KeptGradients, find_uses
from .randomness import RandomState
from .recording import Recorder
from .shares import ParameterShare, count_cost


@dataclass
class Chunk:
    """Some of the retain samples.

    Parameters:
        samples (`slice`): Their numbers in the batch.
        inputs (`dict`): Their inputs.
        random_state ([`RandomState`]): With which their forward pass started: repeated, it drops out the same.
    """

    samples: slice
    inputs: dict
    random_state: RandomState | None = None

    def losses(self, model: nn.Module, per_sample_losses: PerSampleLosses) -> Tensor:
        if self.random_state is None:
            self.random_state = RandomState.now()
        else:
            self.random_state.restore()
        return per_sample_losses(model, self.inputs)


@dataclass
class RepeatedGradients(StepGradients):
    """Inner products without any gradients: the update takes each chunk forward and backward once more."""

    parameters: Parameters
    per_sample_losses: PerSampleLosses
    model: nn.Module
    forget_gradients: dict[str, Tensor]
    chunks: list[Chunk]

    def combine(self, forget_weight: float, retain_weight: float, coefficients: dict[str, Tensor]) -> Tensor:
        mean = torch.full_like(self.retain_losses, retain_weight / len(self.retain_losses))
        shared = mean + next(iter(coefficients.values())).to(mean) if coefficients else mean
        found: dict[str, Tensor | None] = dict.fromkeys(self.parameters.trainable)
        for name, gradient in self.forget_gradients.items():
            found[name] = gradient.mul_(forget_weight)
        end = RandomState.now()
        for chunk in self.chunks:
            losses = chunk.losses(self.model, self.per_sample_losses)
            terms = [(shared, self.parameters.projected)]
            if self.parameters.others:
                terms.insert(0, (mean, self.parameters.others))
            for weights, parameters in terms:
                weighted = weights[chunk.samples] @ losses
                last = parameters is self.parameters.projected
                gradients = torch.autograd.grad(
                    weighted, list(parameters.values()), retain_graph=not last, allow_unused=True
                )
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        found[name] = gradient if found[name] is None else found[name].add_(gradient)
        end.restore()
        return known_gradients(self.parameters.trainable, found)


class ChunkedGramEngine(GramEngine):
    """The gram engine over retain batches of any size.

    Args:
        parameters ([`Parameters`]): What to differentiate by.
        per_sample_losses (`Callable`): The losses of a batch.
        chunk_size (`int`): Samples that run forward at once.
    """

    def __init__(self, parameters: Parameters, per_sample_losses: PerSampleLosses, chunk_size: int):
        super().__init__(parameters, per_sample_losses)
        self.chunk_size = chunk_size

    def measure(self, model: nn.Module, forget: Mapping, retain: Mapping, slopes: Slopes) -> StepGradients:
        chunks = split_samples(retain, self.chunk_size)
        if len(chunks) == 1:
            return super().measure(model, forget, retain, slopes)
        forget_losses, forget_gradients = self.forget_gradients(model, forget, slopes)
        groups = self._group(model, chunks)
        grams, losses, end = {}, None, None
        for group in groups:
            shares, found = self._sweep(model, chunks, group, forget_gradients, keeps=len(groups) == 1)
            projected = [name for name in group if name in self.parameters.projected]
            grams.update({name: shares[name].gram(self._scratch) for name in projected})
            if end is None:
                losses, end = found, RandomState.now()
        end.restore()
        common = (forget_losses, losses, {name: grams[name] for name in self.parameters.projected})
        if len(groups) == 1:
            return KeptGradients(*common, self.parameters, shares)
        return RepeatedGradients(*common, self.parameters, self.per_sample_losses, model, forget_gradients, chunks)

    def _group(self, model: nn.Module, chunks: list[Chunk]) -> list[list[str]]:
        """Parameters in the order of their use, cut where a group would keep too much.

        That is more than the parameters of one chunk together would, or, as with an adapter, more than the model takes.
        """
        trainable, first = self.parameters.trainable, chunks[0]
        recorder = Recorder(trainable)
        try:
            with recorder:
                recorder.begin(first.inputs)
                size = len(first.losses(model, self.per_sample_losses))
            uses = find_uses(recorder.calls)
        finally:
            recorder.close()
        kept = {name: count_cost(trainable[name].shape, uses[name], size).kept_bytes for name in uses}
        budget = max(sum(kept.values()), sum(parameter.nbytes for parameter in model.parameters()))
        groups, used = [[]], 0
        for name in [*uses, *(name for name in trainable if name not in uses)]:
            bytes_of_all = kept.get(name, 0) * chunks[-1].samples.stop / size
            if groups[-1] and used + bytes_of_all > budget:
                groups.append([])
                used = 0
            groups[-1].append(name)
            used += bytes_of_all
        return groups

    def _sweep(
        self,
        model: nn.Module,
        chunks: list[Chunk],
        group: list[str],
        forget_gradients: dict[str, Tensor],
        *,
        keeps: bool,
    ) -> tuple[dict[str, ParameterShare], Tensor]:
        """Takes every chunk forward and backward for one group; returns its shares and all losses, (k,)."""
        trainable, num_samples = self.parameters.trainable, chunks[-1].samples.stop
        shares = {
            name: ParameterShare(
                trainable[name],
                forget_gradients.get(name),
                num_samples,
                projected=name in self.parameters.projected,
                keeps=keeps,
            )
            for name in group
        }
        losses = []
        for chunk in chunks:
            recorder = Recorder({name: trainable[name] for name in group})
            try:
                with recorder:
                    recorder.begin(chunk.inputs)
                    own = chunk.losses(model, self.per_sample_losses)
                    self._collect(recorder, shares, own, chunk.samples, retain_graph=False)
            finally:
                recorder.close()
            losses.append(own.detach())
        return shares, torch.cat(losses)


def split_samples(inputs: Mapping, size: int) -> list[Chunk]:
    """Cuts the tensors of a batch along their first dimension; other inputs go to every chunk."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim}
    num_samples = len(next(iter(tensors.values())))

    chunks = []
    for start in range(0, num_samples, size):
        samples = slice(start, min(start + size, num_samples))
        own = {name: value[samples] for name, value in tensors.items() if len(value) == num_samples}
        chunks.append(Chunk(samples, {**inputs, **own}))
    return chunks
