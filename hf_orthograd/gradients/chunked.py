"""More retain samples than memory holds at once: the Gram matrix of all of them, from passes over a few at a time.

A chunk's inner products with the other chunks need their gradients side by side. So parameters are taken in groups whose
gradients (or factors) of *all* samples take no more memory than all parameters' would of three quarters of *one* chunk,
or than the model. For each group all samples run forward, a quarter of a chunk at a time, and backward as far as the
group reaches; then all inner products of the group are taken at once. With n chunks there are about 4/3 n groups, and as
many passes over k samples, which is quadratic in k, and one more for the update. Where everything fits into one group, as
with an adapter, there is one pass in all, and whole chunks run forward.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import Parameters, PerSampleLosses, StepGradients, count_samples
from .randomness import RandomState


@dataclass
class Chunk:
    """Some of the retain samples of this process.

    Parameters:
        samples (`slice`): Their numbers.
        inputs (`Mapping`): Their inputs.
        repeats (`bool`): Whether their forward pass may run more than once.
        random_state ([`RandomState`]): With which it started: repeated, it drops out the same.
    """

    samples: slice
    inputs: Mapping
    repeats: bool = False
    random_state: RandomState | None = None

    def losses(self, model: nn.Module, per_sample_losses: PerSampleLosses) -> Tensor:
        if self.random_state is not None:
            self.random_state.restore()
        elif self.repeats:
            self.random_state = RandomState.now()
        return per_sample_losses(model, self.inputs)


def split_samples(batches: list[Mapping], size: int | None) -> list[Chunk]:
    """Cuts the tensors of each batch along their first dimension; its other inputs go to every chunk."""
    chunks, start = [], 0
    for inputs in batches:
        count = count_samples(inputs)
        for first in range(0, count, size or count):
            own = slice(first, min(first + (size or count), count))
            cut = {
                name: value[own]
                for name, value in inputs.items()
                if isinstance(value, Tensor) and value.ndim and len(value) == count
            }
            samples = slice(start + own.start, start + own.stop)
            chunks.append(Chunk(samples, {**inputs, **cut}))
        start += count
    for chunk in chunks:
        chunk.repeats = len(chunks) > 1
    return chunks


@dataclass
class RepeatedGradients(StepGradients):
    """Inner products without any gradients: the update takes each chunk forward and backward once more.

    Parameters:
        parameters ([`Parameters`]): What the gradients belong to.
        losses_of (`Callable`): Maps a chunk to its losses, scaled.
        forget_gradients (`dict[str, torch.Tensor]`): `g_u` of each trainable parameter that the forget loss uses.
        chunks (`list[Chunk]`): The retain samples of this process.
    """

    parameters: Parameters
    losses_of: Callable[[Chunk], Tensor]
    forget_gradients: dict[str, Tensor]
    chunks: list[Chunk]

    def combine(self, forget_weight: float, retain_weight: float, coefficients: dict[str, Tensor]) -> Tensor:
        mean = self.own_weights(retain_weight, None)
        shared = self.own_weights(retain_weight, next(iter(coefficients.values()), None))
        terms = [(mean, self.parameters.others), (shared, self.parameters.projected)]
        found = {name: gradient.mul_(forget_weight) for name, gradient in self.forget_gradients.items()}
        end = RandomState.now()
        for chunk in self.chunks:
            losses = self.losses_of(chunk)
            for weights, parameters in terms:
                if not parameters:
                    continue
                gradients = torch.autograd.grad(
                    weights[chunk.samples] @ losses,
                    list(parameters.values()),
                    retain_graph=parameters is self.parameters.others,
                    allow_unused=True,
                )
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        found[name] = gradient if name not in found else found[name].add_(gradient)
        end.restore()
        return self.parameters.hand_over(found)
