"""The engines that hold whole retain gradients: one ordinary backward for each, or one for their mean."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import Batch
from ..parallel import ALONE, Parameters, SampleLayout
from ..projection import UpdateWeights
from .base import ForgetBatch, GradientEngine, MeasureSettings, StepGradients
from .products import accumulation_dtype, assemble_grams, exact_arithmetic, inner_products


@dataclass
class MaterializedGradients(StepGradients):
    """Gradients held in memory, k + 1 times the trainable parameters.

    Attributes:
        forget_gradients (`dict[str, torch.Tensor]`): `g_u` of each trainable parameter that the forget loss uses.
        rows (`dict[str, torch.Tensor]`): For each trainable parameter, the retain rows, shape (k, *parameter.shape).
    """

    forget_gradients: dict[str, Tensor]
    rows: dict[str, Tensor]

    @property
    def has_retain_gradients(self) -> bool:
        return True

    def combine(self, weights: UpdateWeights) -> Tensor:
        gradients = {name: weights.forget * gradient for name, gradient in self.forget_gradients.items()}
        for name, rows in self.rows.items():
            with exact_arithmetic(rows.device):
                retained = torch.tensordot(self.local_weights(weights, name), rows.float(), dims=1)
            gradients[name] = retained if name not in gradients else gradients[name].add_(retained)
        return self.hand_over(gradients)

    def along(self, step: Iterable[tuple[str, Tensor]]) -> Tensor:
        device = self.retain_losses.device
        products = [torch.zeros(self.layout.local, dtype=accumulation_dtype(device), device=device)]
        for name, change in step:
            if name in self.rows:
                rows = self.rows[name].flatten(1)
                products.append(inner_products(rows, change.reshape(1, -1).to(rows))[:, 0].to(device))
        return self.layout.gather_rows(torch.stack(products).sum(dim=0))

    def combination(self, name: str, coefficients: Tensor) -> Tensor:
        if name not in self.rows:
            return torch.zeros_like(self.parameters.trainable[name])
        weights = coefficients[self.layout.span].to(self.retain_losses.device, torch.float32)
        return self.layout.group.sum(torch.tensordot(weights, self.rows[name].float(), dims=1))


def materialized(
    parameters: Parameters,
    settings: MeasureSettings,
    losses: tuple[Tensor, Tensor],
    forget_gradients: dict[str, Tensor],
    rows: dict[str, Tensor],
    layout: SampleLayout,
) -> MaterializedGradients:
    """Takes the inner products of gradients that are held in memory.

    Args:
        parameters ([`Parameters`]): What they belong to.
        settings ([`MeasureSettings`]): What was asked for.
        losses (`tuple[torch.Tensor, torch.Tensor]`): Of this process' forget and retain samples.
        forget_gradients (`dict[str, torch.Tensor]`): `g_u` of each trainable parameter that the forget loss uses.
        rows (`dict[str, torch.Tensor]`): For each trainable parameter that a retain loss uses, in any process, shape
            (local, *parameter.shape).
        layout ([`SampleLayout`]): The rows among those of all processes.
    """
    products, device = {}, losses[1].device
    for name in parameters.projected:
        if name not in rows:
            shape = layout.local, 1 + layout.total
            products[name] = torch.zeros(shape, dtype=accumulation_dtype(device), device=device)
            continue
        flat = rows[name].flatten(1)
        forget = forget_gradients.get(name)
        first = flat.new_zeros(1, flat.shape[1]) if forget is None else forget.reshape(1, -1)
        products[name] = inner_products(flat, torch.cat((first, layout.gather_rows(flat))))
    parts = {name: [forget_gradients[name]] if name in forget_gradients else [] for name in products}
    if not settings.per_parameter:
        products = {"": torch.stack([product.to(device) for product in products.values()]).sum(dim=0)}
        parts = {"": [part for own in parts.values() for part in own]}
    grams = assemble_grams(products, parts, layout)
    forget_losses, retain_losses = losses
    return MaterializedGradients(
        forget_losses, retain_losses.detach(), grams, layout, parameters, settings.group, forget_gradients, rows
    )


class MaterializingEngine(GradientEngine):
    """Shared by the engines that differ only in how the retain rows are made."""

    def retain_rows(self, model: nn.Module, retain: Batch, loss_scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the retain losses (k,), and for each trainable parameter rows of shape (k, *parameter.shape)."""
        raise NotImplementedError

    def step_gradients(
        self, model: nn.Module, forget: list[ForgetBatch], retain: list[Batch], settings: MeasureSettings
    ) -> MaterializedGradients:
        forget_losses, forget_gradients = self.forget_gradients(model, forget, settings.group, settings.loss_scale)
        found = [self.retain_rows(model, batch, settings.loss_scale) for batch in retain]
        retain_losses = torch.cat([losses for losses, _ in found])
        layout = settings.group.layout(len(retain_losses), retain_losses.device)
        trainable, rows = self.parameters.trainable, {}
        used = {name for _, own in found for name in own}
        for name in settings.group.used_anywhere(trainable, used, retain_losses.device):
            zeros = trainable[name].detach().new_zeros(1, *trainable[name].shape)
            parts = [
                own[name] if name in own else zeros.expand(len(losses), *zeros.shape[1:]) for losses, own in found
            ]
            rows[name] = torch.cat(parts)
        losses = forget_losses, retain_losses
        return materialized(self.parameters, settings, losses, forget_gradients, rows, layout)


class LoopEngine(MaterializingEngine):
    """One ordinary backward pass for each retain sample, from one forward pass: the reference for every other engine."""

    name = "loop"

    def retain_rows(self, model: nn.Module, retain: Batch, loss_scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        losses = retain.losses(model, self.per_sample_losses)
        return losses, _stacked_gradients(list(loss_scale * losses), self.parameters.trainable)


class MeanEngine(GradientEngine):
    """One ordinary backward pass for the mean of each retain batch; the mean of all samples makes one row."""

    name = "mean"

    def step_gradients(
        self, model: nn.Module, forget: list[ForgetBatch], retain: list[Batch], settings: MeasureSettings
    ) -> MaterializedGradients:
        forget_losses, forget_gradients = self.forget_gradients(model, forget, settings.group, settings.loss_scale)
        losses, own_rows, trainable = [], {}, self.parameters.trainable
        total = settings.group.layout(sum(batch.size for batch in retain), self.parameters.device).total
        for batch in retain:
            own = batch.losses(model, self.per_sample_losses)
            for name, row in _stacked_gradients([settings.loss_scale * own.sum() / total], trainable).items():
                own_rows[name] = row if name not in own_rows else own_rows[name] + row
            losses.append(own.detach())
        losses, rows = torch.cat(losses), {}
        for name in settings.group.used_anywhere(trainable, own_rows, losses.device):
            row = own_rows[name] if name in own_rows else trainable[name].detach().new_zeros(1, *trainable[name].shape)
            rows[name] = settings.group.sum(row)
        # every process has the one row of all
        layout = SampleLayout(ALONE, (1,))
        losses = forget_losses, losses
        return materialized(self.parameters, settings, losses, forget_gradients, rows, layout)


def _stacked_gradients(losses: list[Tensor], parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """For each parameter that a loss uses, the gradients of the losses, shape (len(losses), *parameter.shape)."""
    rows = {}
    for i, loss in enumerate(losses):
        retain_graph = i < len(losses) - 1
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=retain_graph, allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if name not in rows:
                rows[name] = gradient.new_zeros(len(losses), *gradient.shape)
            rows[name][i] = gradient
    return rows
