"""Both forward passes and nothing else: the step without a projection."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .base import GradientEngine, Slopes, StepGradients, weighted_mean


@dataclass
class PlainGradients(StepGradients):
    """Losses without inner products."""

    def retain_mean(self) -> Tensor:
        return self.retain_losses.mean() if len(self.retain_losses) else self.retain_losses.sum()

    def retain_combination(self, coefficients: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError("A step without a projection has no coefficients.")


class PlainEngine(GradientEngine):
    """Gradient ascent and GradDiff need no inner products, and ascent alone no retain batch."""

    name = "none"
    supports_per_tensor = True

    def measure(
        self, model: nn.Module, forget: Mapping, retain: Mapping | None, slopes: Slopes, merge_retain: bool = False
    ) -> StepGradients:
        forget_losses = self.per_sample_losses(model, forget)
        retain_losses = forget_losses.new_zeros(0) if retain is None else self.per_sample_losses(model, retain)
        return PlainGradients(forget_losses, retain_losses, weighted_mean(forget_losses, slopes), {})
