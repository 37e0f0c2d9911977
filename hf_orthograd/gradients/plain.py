"""Both forward passes and nothing else: the step without a projection."""

from dataclasses import dataclass

from torch import Tensor, nn

from ..data import Batch
from ..projection import UpdateWeights
from .base import ForgetBatch, GradientEngine, MeasureSettings, StepGradients


@dataclass
class PlainGradients(StepGradients):
    """Losses without inner products, and the graph of both batches.

    Attributes:
        forget_term (`torch.Tensor`): Scalar whose gradient is `g_u`.
        retain_term (`torch.Tensor`): Scalar whose gradient is that of the retain samples' losses, or of the term in their
            place, in the mean.
    """

    forget_term: Tensor
    retain_term: Tensor

    def combine(self, weights: UpdateWeights) -> Tensor:
        of_retain = weights.retain_mean if self.retain_terms is None else weights.retain_term
        total = weights.forget * self.forget_term + of_retain * self.retain_term
        return total - total.detach()


class PlainEngine(GradientEngine):
    """Gradient ascent and GradDiff need no inner products, and ascent alone no retain batch."""

    name = "none"

    def step_gradients(
        self, model: nn.Module, forget: list[ForgetBatch], retain: list[Batch], settings: MeasureSettings
    ) -> StepGradients:
        """Takes one batch of each kind at most: without inner products, batches and processes simply add up.

        Losses go backward as any do, so that `accelerator.backward` scales them.
        """
        (batch,) = forget
        forget_losses = batch.losses(model, self.per_sample_losses)
        forget_term = (batch.slopes(forget_losses.detach()) * forget_losses).mean()
        retain_losses = terms = forget_losses.new_zeros(0)
        if retain:
            retain_losses, terms = retain[0].losses_and_terms(model, self.per_sample_losses, settings.retain_term)
        retain_term = terms.mean() if retain else terms.sum()
        layout = settings.group.layout(len(retain_losses), retain_losses.device)
        losses = forget_losses.detach(), retain_losses.detach(), terms.detach() if settings.retain_term else None
        return PlainGradients(*losses, {}, layout, self.parameters, settings.group, forget_term, retain_term)
