"""OrthoGrad with a memory: the retain gradients of earlier steps, as they were then, are projected out as well."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_orthograd import OrthoGradTrainer
from hf_orthograd.gradients import FunctionalEngine, GradientEngine
from hf_orthograd.gradients.loop import MaterializedGradients


@dataclass
class RememberedGradients(MaterializedGradients):
    """Of the rows only the first `fresh` ones count in the retain mean; the projection is over all."""

    fresh: int

    def own_weights(self, retain_weight: float, coefficients: Tensor | None) -> Tensor:
        weights = self.retain_losses.new_zeros(self.placement.own)
        weights[: self.fresh] = retain_weight / self.fresh
        return weights if coefficients is None else weights + coefficients.to(weights)


class RememberingEngine(FunctionalEngine):
    """Per-sample gradients of this step's retain samples, and of those of the steps before, in one process.

    Args:
        remembered_steps (`int`): How many steps before.
    """

    def __init__(self, *args, remembered_steps: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.past: deque[dict[str, Tensor]] = deque(maxlen=remembered_steps)

    def _results(self, forget_losses, retain_losses, forget_gradients, rows, placement) -> RememberedGradients:
        known = {name: torch.cat([own, *(past[name] for past in self.past)]) for name, own in rows.items()}
        self.past.appendleft(rows)
        placement = self.exchange.place(len(next(iter(known.values()))), retain_losses.device)
        found = super()._results(forget_losses, retain_losses, forget_gradients, known, placement)
        return RememberedGradients(**vars(found), fresh=len(retain_losses))


class RetainMemoryTrainer(OrthoGradTrainer):
    """Trainer for full-precision runs in one process.

    Args:
        remembered_steps (`int`): How many steps' retain gradients are remembered beside those of the step itself.
    """

    def __init__(self, *args, remembered_steps: int = 3, **kwargs):
        super().__init__(*args, **kwargs)
        self.remembered_steps = remembered_steps

    def _choose_engine(self, model: nn.Module) -> GradientEngine:
        checked = super()._choose_engine(model)
        settings = {"chunk_size": self.args.func_chunk_size, "remembered_steps": self.remembered_steps}
        return RememberingEngine(checked.parameters, checked.per_sample_losses, **settings)
