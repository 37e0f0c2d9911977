"""The engines that hold each retain sample's whole gradient: an ordinary backward for each, or torch.func."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import GradientEngine, Parameters, Slopes, StepGradients, inner_products, linear_surrogate, weighted_mean


@dataclass
class MaterializedGradients(StepGradients):
    """Gradients held in memory, k + 1 times the trainable parameters.

    Parameters:
        rows (`dict[str, torch.Tensor]`): For each trainable parameter, the retain rows, shape (k, *parameter.shape).
        parameters ([`Parameters`]): What the rows belong to.
    """

    rows: dict[str, Tensor]
    parameters: Parameters

    def retain_mean(self) -> Tensor:
        means = {name: rows.mean(dim=0) for name, rows in self.rows.items()}
        return linear_surrogate(self.parameters.trainable, means) + self.retain_losses.detach().mean()

    def retain_combination(self, coefficients: dict[str, Tensor]) -> Tensor:
        combinations = {
            name: torch.tensordot(coefficients[name].to(self.rows[name]), self.rows[name], dims=1)
            for name in self.parameters.projected
        }
        return linear_surrogate(self.parameters.projected, combinations)


class MaterializingEngine(GradientEngine):
    """Shared by the engines that differ only in how the retain rows are made."""

    supports_per_tensor = True

    def retain_rows(self, model: nn.Module, retain: Mapping) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the retain losses (k,), and for each trainable parameter rows of shape (k, *parameter.shape)."""
        raise NotImplementedError

    def measure(
        self, model: nn.Module, forget: Mapping, retain: Mapping, slopes: Slopes, merge_retain: bool = False
    ) -> StepGradients:
        forget_losses = self.per_sample_losses(model, forget)
        retain_losses, rows = self.retain_rows(model, retain)
        if merge_retain:
            rows = {name: row.mean(dim=0, keepdim=True) for name, row in rows.items()}
        forget_term = weighted_mean(forget_losses, slopes)
        projected = self.parameters.projected
        forget_rows = gradients_or_zeros(forget_term, projected)
        grams = {name: _gram(forget_rows[name][None], rows[name]) for name in projected}
        return MaterializedGradients(forget_losses, retain_losses, forget_term, grams, rows, self.parameters)


class LoopEngine(MaterializingEngine):
    """One ordinary backward pass for each retain sample, from one forward pass: the reference for every other engine."""

    name = "loop"

    def retain_rows(self, model: nn.Module, retain: Mapping) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.per_sample_losses(model, retain)
        trainable = self.parameters.trainable
        samples = [gradients_or_zeros(loss, trainable) for loss in losses]
        return losses, {name: torch.stack([sample[name] for sample in samples]) for name in trainable}


def gradients_or_zeros(loss: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradient for each parameter, by name, leaving the graph in place for another pass."""
    gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))


def _gram(*row_blocks: Tensor) -> Tensor:
    flat = torch.cat([block.flatten(1) for block in row_blocks])
    return inner_products(flat, flat)
