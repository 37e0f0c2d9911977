"""Both forward passes and nothing else: the step without a projection."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .base import GradientEngine, Slopes, StepGradients, weighted_mean


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

    def measure(self, model: nn.Module, forget: Mapping, retain: Mapping | None, slopes: Slopes) -> StepGradients:
        forget_losses = self.per_sample_losses(model, forget)
        forget_term = weighted_mean(forget_losses, slopes)
        retain_losses = forget_losses.new_zeros(0) if retain is None else self.per_sample_losses(model, retain)
        retain_term = retain_losses.mean() if len(retain_losses) else retain_losses.sum()
        return PlainGradients(forget_losses.detach(), retain_losses.detach(), {}, forget_term, retain_term)
