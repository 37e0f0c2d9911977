"""The engines that hold whole retain gradients: one ordinary backward for each, one for their mean, or torch.func."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..distributed import Exchange
from .base import (
    ForgetBatch,
    GradientEngine,
    Parameters,
    StepGradients,
    assemble_grams,
    count_samples,
    exact_arithmetic,
    first_device,
    inner_products,
)


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

    @property
    def outlives_combine(self) -> bool:
        return True

    def combine(self, forget_weight: float, retain_weight: float, coefficients: dict[str, Tensor]) -> Tensor:
        gradients = {}
        for name, rows in self.rows.items():
            weights = self.own_weights(retain_weight, coefficients.get(name)).to(rows.dtype)
            with exact_arithmetic(rows.device):
                gradients[name] = torch.tensordot(weights, rows, dims=1)
            if name in self.forget_gradients:
                gradients[name] += forget_weight * self.forget_gradients[name]
        return self.parameters.hand_over(gradients)

    def along(self, step: Iterable[tuple[str, Tensor]]) -> Tensor:
        own = sum(
            inner_products(self.rows[name].flatten(1), change.reshape(1, -1).to(self.rows[name])).cpu()
            for name, change in step
        )
        return self.placement.gather_rows(own[:, 0].to(self.retain_losses.device))

    def combination(self, name: str, coefficients: Tensor) -> Tensor:
        weights = coefficients[self.placement.span].to(self.rows[name])
        return self.placement.exchange.sum(torch.tensordot(weights, self.rows[name], dims=1))


class MaterializingEngine(GradientEngine):
    """Shared by the engines that differ only in how the retain rows are made."""

    def retain_rows(self, model: nn.Module, retain: Mapping) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the retain losses (k,), and for each trainable parameter rows of shape (k, *parameter.shape)."""
        raise NotImplementedError

    def measure(self, model: nn.Module, forget: list[ForgetBatch], retain: list[Mapping]) -> StepGradients:
        forget_losses, forget_gradients = self.forget_gradients(model, forget)
        found = [self.retain_rows(model, inputs) for inputs in retain]
        retain_losses = torch.cat([losses for losses, _ in found]).detach()
        rows = {name: torch.cat([own[name] for _, own in found]) for name in self.parameters.trainable}
        placement = self.exchange.place(len(retain_losses), retain_losses.device)
        return self._results(forget_losses, retain_losses, forget_gradients, rows, placement)

    def _results(self, forget_losses, retain_losses, forget_gradients, rows, placement) -> MaterializedGradients:
        products = {}
        for name in self.parameters.projected:
            flat = rows[name].flatten(1)
            forget = forget_gradients.get(name)
            first = flat.new_zeros(1, flat.shape[1]) if forget is None else forget.reshape(1, -1)
            everyone = placement.gather_rows(flat)
            products[name] = torch.cat((inner_products(flat, first), inner_products(flat, everyone)), dim=1)
        grams = assemble_grams(products, forget_gradients, placement)
        return MaterializedGradients(
            forget_losses, retain_losses, grams, placement, forget_gradients, rows, self.parameters
        )


class LoopEngine(MaterializingEngine):
    """One ordinary backward pass for each retain sample, from one forward pass: the reference for every other engine."""

    name = "loop"

    def retain_rows(self, model: nn.Module, retain: Mapping) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.per_sample_losses(model, retain)
        return losses, _stacked_gradients(list(self.loss_scale * losses), self.parameters.trainable)


class MeanEngine(MaterializingEngine):
    """One ordinary backward pass for the mean of each retain batch; the mean of all samples makes one row."""

    name = "mean"

    def measure(self, model: nn.Module, forget: list[ForgetBatch], retain: list[Mapping]) -> StepGradients:
        forget_losses, forget_gradients = self.forget_gradients(model, forget)
        trainable, losses, rows = self.parameters.trainable, [], {}
        total = self.exchange.place(sum(map(count_samples, retain)), first_device(model)).total
        for inputs in retain:
            own = self.per_sample_losses(model, inputs)
            for name, row in _stacked_gradients([self.loss_scale * own.sum() / total], trainable).items():
                rows[name] = row if name not in rows else rows[name] + row
            losses.append(own.detach())
        rows = {name: self.exchange.sum(row) for name, row in rows.items()}
        # every process has the one row of all
        placement = Exchange().place(1, first_device(model))
        return self._results(forget_losses, torch.cat(losses), forget_gradients, rows, placement)


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
