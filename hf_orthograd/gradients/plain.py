"""Both forward passes and nothing else: the step without a projection."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .base import ForgetBatch, GradientEngine, StepGradients


@dataclass
class PlainGradients(StepGradients):
    """Losses without inner products, and the graph of both batches.

    Parameters:
        forget_term (`torch.Tensor`): Scalar whose gradient is `g_u`.
        retain_term (`torch.Tensor`): Scalar whose gradient is the mean retain gradient.
    """

    forget_term: Tensor
    retain_term: Tensor

    def combine(self, forget_weight: float, retain_weight: float, coefficients: dict[str, Tensor]) -> Tensor:
        total = forget_weight * self.forget_term + retain_weight * self.retain_term
        return total - total.detach()


class PlainEngine(GradientEngine):
    """Gradient ascent and GradDiff need no inner products, and ascent alone no retain batch."""

    name = "none"

    def measure(self, model: nn.Module, forget: list[ForgetBatch], retain: list[Mapping]) -> StepGradients:
        """Takes one batch of each kind at most: without inner products, batches and processes simply add up."""
        (batch,) = forget
        forget_losses = self.per_sample_losses(model, batch.inputs)
        forget_term = (batch.slopes(forget_losses.detach()) * forget_losses).mean()
        retain_losses = self.per_sample_losses(model, retain[0]) if retain else forget_losses.new_zeros(0)
        retain_term = retain_losses.mean() if retain else retain_losses.sum()
        placement = self.exchange.place(len(retain_losses), retain_losses.device)
        return PlainGradients(forget_losses.detach(), retain_losses.detach(), {}, placement, forget_term, retain_term)
