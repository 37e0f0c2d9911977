"""The engines that hold whole retain gradients: one ordinary backward for each, or one for their mean."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import Batch
from ..parallel import ALONE, Parameters, SampleLayout
from ..projection import UpdateWeights
from .base import ForgetBatch, GradientEngine, MeasureSettings, RetainTerm, StepGradients
from .products import accumulation_dtype, as_rows, assemble_grams, exact_arithmetic, inner_products, own_memory


@dataclass
class MaterializedGradients(StepGradients):
    """Gradients held in memory, k + 1 times the trainable parameters.

    Attributes:
        forget_gradients (`dict[str, torch.Tensor]`): `g_u` of each trainable parameter that the forget loss uses.
        rows (`dict[str, torch.Tensor]`): For each trainable parameter, the retain rows, shape (k, *parameter.shape).
        term_gradients (`dict[str, torch.Tensor]`): Of the retain term, if it is not the losses' mean.
    """

    forget_gradients: dict[str, Tensor]
    rows: dict[str, Tensor]
    term_gradients: dict[str, Tensor]

    @property
    def has_retain_gradients(self) -> bool:
        return True

    def combine(self, weights: UpdateWeights) -> Tensor:
        gradients = {name: weights.forget * gradient for name, gradient in self.forget_gradients.items()}
        for name, rows in self.rows.items():
            with exact_arithmetic(rows.device):
                retained = torch.tensordot(self.local_weights(weights, name), rows.float(), dims=1)
            gradients[name] = retained if name not in gradients else gradients[name].add_(retained)
        for name, gradient in self.term_gradients.items():
            own = self.term_weight(weights) * gradient
            gradients[name] = own if name not in gradients else gradients[name].add_(own)
        return self.hand_over(gradients)

    def along(self, step: Iterable[tuple[str, Tensor]]) -> Tensor:
        device = self.retain_losses.device
        products = [torch.zeros(self.layout.local, dtype=accumulation_dtype(device), device=device)]
        for name, change in step:
            if name in self.rows:
                rows = as_rows(self.rows[name])
                products.append(inner_products(rows, change.reshape(1, -1).to(rows))[:, 0].to(device))
        return self.layout.gather_rows(torch.stack(products).sum(dim=0))

    def combination(self, name: str, coefficients: Tensor) -> Tensor:
        if name not in self.rows:
            return torch.zeros_like(self.parameters.trainable[name])
        weights = coefficients[self.layout.span].to(self.retain_losses.device, torch.float32)
        with exact_arithmetic(weights.device):
            return self.layout.group.sum(torch.tensordot(weights, self.rows[name].float(), dims=1))


def materialized(
    parameters: Parameters,
    settings: MeasureSettings,
    losses: tuple[Tensor, Tensor, Tensor | None],
    forget_gradients: dict[str, Tensor],
    rows: dict[str, Tensor],
    term_gradients: dict[str, Tensor],
    layout: SampleLayout,
) -> MaterializedGradients:
    """Takes the inner products of gradients that are held in memory.

    Args:
        parameters ([`Parameters`]): What they belong to.
        settings ([`MeasureSettings`]): What was asked for.
        losses (`tuple`): Of this process' forget and retain samples, and the retain terms, if they are others.
        forget_gradients (`dict[str, torch.Tensor]`): `g_u` of each trainable parameter that the forget loss uses.
        rows (`dict[str, torch.Tensor]`): For each trainable parameter that a retain loss uses, in any process, shape
            (local, *parameter.shape).
        term_gradients (`dict[str, torch.Tensor]`): Of this process' part of the mean retain term.
        layout ([`SampleLayout`]): The rows among those of all processes.
    """
    products, device = {}, losses[1].device
    for name in parameters.projected:
        if name not in rows:
            shape = layout.local, 1 + layout.total
            products[name] = torch.zeros(shape, dtype=accumulation_dtype(device), device=device)
            continue
        flat = as_rows(rows[name])
        forget = forget_gradients.get(name)
        first = flat.new_zeros(1, flat.shape[1]) if forget is None else forget.reshape(1, -1)
        products[name] = inner_products(flat, torch.cat((first, layout.gather_rows(flat))))
    parts = {name: [forget_gradients[name]] if name in forget_gradients else [] for name in products}
    if not settings.per_parameter:
        products = {"": torch.stack([product.to(device) for product in products.values()]).sum(dim=0)}
        parts = {"": [part for own in parts.values() for part in own]}
    grams = assemble_grams(products, parts, layout)
    whose = grams, layout, parameters, settings.group
    return MaterializedGradients(*losses, *whose, forget_gradients, rows, term_gradients)


class MaterializingEngine(GradientEngine):
    """Shared by the engines that differ only in how the retain rows are made."""

    def retain_rows(
        self, model: nn.Module, retain: Batch, loss_scale: float, term: RetainTerm | None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Returns of a retain batch the losses (k,), for each trainable parameter rows of shape (k, *parameter.shape), the
        retain terms (k,), and the gradients of their sum, none without a term of its own."""
        raise NotImplementedError

    def step_gradients(
        self, model: nn.Module, forget: list[ForgetBatch], retain: list[Batch], settings: MeasureSettings
    ) -> MaterializedGradients:
        forget_losses, forget_gradients = self.forget_gradients(model, forget, settings.group, settings.loss_scale)
        found, term_gradients = [], {}
        for batch in retain:
            losses, own, terms, of_terms = self.retain_rows(model, batch, settings.loss_scale, settings.retain_term)
            found.append((losses.detach(), own, terms.detach()))
            for name, gradient in of_terms.items():
                term_gradients[name] = gradient + term_gradients[name] if name in term_gradients else gradient
        retain_losses, retain_terms = (torch.cat([batch[i] for batch in found]) for i in (0, 2))
        layout = settings.group.layout(len(retain_losses), retain_losses.device)
        trainable, rows = self.parameters.trainable, {}
        used = {name for _, own, _ in found for name in own}
        for name in settings.group.used_anywhere(trainable, used, retain_losses.device):
            zeros = trainable[name].detach().new_zeros(1, *trainable[name].shape)
            parts = [
                own[name] if name in own else zeros.expand(len(losses), *zeros.shape[1:]) for losses, own, _ in found
            ]
            rows[name] = torch.cat(parts)
        losses = forget_losses, retain_losses, retain_terms if settings.retain_term else None
        term_gradients = {name: gradient / layout.total for name, gradient in term_gradients.items()}
        return materialized(self.parameters, settings, losses, forget_gradients, rows, term_gradients, layout)


class LoopEngine(MaterializingEngine):
    """One ordinary backward pass for each retain sample, from one forward pass: the reference for every other engine."""

    name = "loop"

    def retain_rows(
        self, model: nn.Module, retain: Batch, loss_scale: float, term: RetainTerm | None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]:
        losses, terms = retain.losses_and_terms(model, self.per_sample_losses, term)
        of_terms = sum_gradients(loss_scale * terms.sum(), self.parameters.trainable) if term is not None else {}
        return losses, _stacked_gradients(list(loss_scale * losses), self.parameters.trainable), terms, of_terms


class MeanEngine(GradientEngine):
    """One ordinary backward pass for the mean of each retain batch; the mean of all samples makes one row."""

    name = "mean"

    def step_gradients(
        self, model: nn.Module, forget: list[ForgetBatch], retain: list[Batch], settings: MeasureSettings
    ) -> MaterializedGradients:
        forget_losses, forget_gradients = self.forget_gradients(model, forget, settings.group, settings.loss_scale)
        losses, terms, own_rows, term_gradients, trainable = [], [], {}, {}, self.parameters.trainable
        term = settings.retain_term
        total = settings.group.layout(sum(batch.size for batch in retain), self.parameters.device).total
        for batch in retain:
            own, own_terms = batch.losses_and_terms(model, self.per_sample_losses, term)
            if term is not None:
                for name, gradient in sum_gradients(settings.loss_scale * own_terms.sum() / total, trainable).items():
                    term_gradients[name] = gradient + term_gradients[name] if name in term_gradients else gradient
            for name, row in _stacked_gradients([settings.loss_scale * own.sum() / total], trainable).items():
                own_rows[name] = row if name not in own_rows else own_rows[name] + row
            losses.append(own.detach())
            terms.append(own_terms.detach())
        losses, rows = torch.cat(losses), {}
        for name in settings.group.used_anywhere(trainable, own_rows, losses.device):
            row = own_rows[name] if name in own_rows else trainable[name].detach().new_zeros(1, *trainable[name].shape)
            rows[name] = settings.group.sum(row)
        # every process has the one row of all
        layout = SampleLayout(ALONE, (1,))
        # and of the term its own part, of which the mean is taken
        term_gradients = {name: settings.group.num_processes * gradient for name, gradient in term_gradients.items()}
        losses = forget_losses, losses, torch.cat(terms) if term is not None else None
        return materialized(self.parameters, settings, losses, forget_gradients, rows, term_gradients, layout)


def sum_gradients(total: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients of a scalar whose graph is needed again, of the parameters that it uses."""
    gradients = torch.autograd.grad(total, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {n: g for n, g in zip(parameters, own_memory(gradients), strict=True) if g is not None}


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
