"""The engines that hold whole retain gradients: one ordinary backward for each, one for their mean, or torch.func."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import GradientEngine, Parameters, Slopes, StepGradients, exact_arithmetic, inner_products, known_gradients


@dataclass
class MaterializedGradients(StepGradients):
    """Gradients held in memory, k + 1 times the trainable parameters.

    Parameters:
        forget_gradients (`dict[str, torch.Tensor]`): `g_u` of each trainable parameter that the forget loss uses.
        rows (`dict[str, torch.Tensor]`): For each trainable parameter, the retain rows, shape (k, *parameter.shape).
        parameters ([`Parameters`]): What the rows belong to.
    """

    forget_gradients: dict[str, Tensor]
    rows: dict[str, Tensor]
    parameters: Parameters

    def combine(self, forget_weight: float, retain_weight: float, coefficients: dict[str, Tensor]) -> Tensor:
        gradients = {}
        for name, rows in self.rows.items():
            weights = torch.full((len(rows),), retain_weight / len(rows), dtype=rows.dtype, device=rows.device)
            if name in coefficients:
                weights = weights + coefficients[name].to(rows)
            with exact_arithmetic(rows.device):
                gradients[name] = torch.tensordot(weights, rows, dims=1)
            if name in self.forget_gradients:
                gradients[name] += forget_weight * self.forget_gradients[name]
        return known_gradients(self.parameters.trainable, gradients)


class MaterializingEngine(GradientEngine):
    """Shared by the engines that differ only in how the retain rows are made."""

    def retain_rows(self, model: nn.Module, retain: Mapping) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the retain losses (k,), and for each trainable parameter rows of shape (k, *parameter.shape)."""
        raise NotImplementedError

    def measure(self, model: nn.Module, forget: Mapping, retain: Mapping, slopes: Slopes) -> StepGradients:
        forget_losses, forget_gradients = self.forget_gradients(model, forget, slopes)
        retain_losses, rows = self.retain_rows(model, retain)
        grams = {name: _gram(forget_gradients.get(name), rows[name]) for name in self.parameters.projected}
        return MaterializedGradients(
            forget_losses, retain_losses.detach(), grams, forget_gradients, rows, self.parameters
        )


class LoopEngine(MaterializingEngine):
    """One ordinary backward pass for each retain sample, from one forward pass: the reference for every other engine."""

    name = "loop"

    def retain_rows(self, model: nn.Module, retain: Mapping) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.per_sample_losses(model, retain)
        return losses, _stacked_gradients(list(losses), self.parameters.trainable)


class MeanEngine(MaterializingEngine):
    """One ordinary backward pass for the mean of the retain samples, which makes one row."""

    name = "mean"

    def retain_rows(self, model: nn.Module, retain: Mapping) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.per_sample_losses(model, retain)
        return losses, _stacked_gradients([losses.mean()], self.parameters.trainable)


def _stacked_gradients(losses: list[Tensor], parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """For each parameter, the gradients of the losses, shape (len(losses), *parameter.shape)."""
    rows = {
        name: parameter.new_empty(len(losses), *parameter.shape).detach() for name, parameter in parameters.items()
    }
    for i, loss in enumerate(losses):
        last = i == len(losses) - 1
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=not last, materialize_grads=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            rows[name][i] = gradient
    return rows


def _gram(forget: Tensor | None, rows: Tensor) -> Tensor:
    first = torch.zeros_like(rows[:1]) if forget is None else forget[None]
    blocks = (first.flatten(1), rows.flatten(1))
    return torch.cat([torch.cat([inner_products(a, b) for b in blocks], dim=1) for a in blocks])
