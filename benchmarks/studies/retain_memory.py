"""OrthoGrad with a memory: the retain gradients of earlier steps, as they were then, are projected out as well."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_orthograd import OrthoGradTrainer
from hf_orthograd.gradients import FunctionalEngine, GradientEngine, MaterializedGradients
from hf_orthograd.gradients.loop import materialized
from hf_orthograd.projection import UpdateWeights


@dataclass
class RememberedGradients(MaterializedGradients):
    """Of the rows only the first ones are of this step; only they count in the retain mean, the projection is over all."""

    def combine(self, weights: UpdateWeights) -> Tensor:
        fresh = torch.arange(self.layout.total) < len(self.retain_losses)
        moved = weights.retain_mean * (fresh / len(self.retain_losses) - 1 / self.layout.total)
        projected = {name: own + moved.to(own) for name, own in weights.projected.items()}
        return super().combine(UpdateWeights(weights.forget, weights.retain_mean, projected, weights.retain_term))


class RememberingEngine(FunctionalEngine):
    """Per-sample gradients of this step's retain samples, and of those of the steps before, in one process.

    Args:
        remembered_steps (`int`): How many steps before.

    Attributes:
        past (`deque[dict[str, torch.Tensor]]`): Their rows, the newest first.
    """

    def __init__(self, *args, remembered_steps: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.past: deque[dict[str, Tensor]] = deque(maxlen=remembered_steps)

    def step_gradients(self, model, forget, retain, settings) -> RememberedGradients:
        own = super().step_gradients(model, forget, retain, settings)
        rows = {name: torch.cat([fresh, *(past[name] for past in self.past)]) for name, fresh in own.rows.items()}
        self.past.appendleft(own.rows)
        layout = own.group.layout(len(next(iter(rows.values()))), own.retain_losses.device)
        losses, gradients = (own.forget_losses, own.retain_losses, own.retain_terms), own.forget_gradients
        found = materialized(self.parameters, settings, losses, gradients, rows, own.term_gradients, layout)
        return RememberedGradients(**vars(found))


class RetainMemoryTrainer(OrthoGradTrainer):
    """Trainer for full-precision runs in one process.

    Args:
        remembered_steps (`int`): How many steps' retain gradients are remembered beside those of the step itself.
    """

    def __init__(self, *args, remembered_steps: int = 3, **kwargs):
        super().__init__(*args, **kwargs)
        self.remembered_steps = remembered_steps

    def make_gradient_engine(self, model: nn.Module) -> GradientEngine:
        checked = super().make_gradient_engine(model)
        settings = {"chunk_size": self.args.func_chunk_size, "remembered_steps": self.remembered_steps}
        return RememberingEngine(checked.parameters, checked.per_sample_losses, **settings)
