"""What the steps really do to the retain samples, beside what was predicted."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from .gradients import Parameters, StepGradients, preserved_modes, preserved_random_state
from .gradients.base import PerSampleLosses
from .sharding import reshard


logger = logging.get_logger(__name__)

# shares of the forget gradient's norm outside of which the projection is doing nothing, or everything
IDLE, EXHAUSTED = 0.999, 0.01
# relative rise of a loss that rounding of float32 alone can make
_ROUNDING = 1e-6


class UnlearningMonitor(TrainerCallback):
    """Logs how the losses of a step's retain samples changed, and warns when the projection does nothing or everything.

    A step that is watched costs two more forward passes over its retain samples, in evaluation mode, and a copy of the
    projected parameters. For each, `metrics` gets

    - "retain_change": the mean change of the retain losses, in nats,
    - "retain_rises": the share of retain samples whose loss rose,
    - "largest_retain_rise": the largest change among them, in nats,
    - "retain_change_predicted": to first order, `mean_i <g_i, change of the parameters>`, where the gradients `g_i` are kept
      until the step is made (not under activation checkpointing of full parameters, nor in chunks, nor without a
      projection).

    Args:
        steps (`int`): Every how many steps one is watched, and the first; 0 for none.
        metrics (`dict[str, list[float]]`): What the trainer logs the means of.
        parameters ([`Parameters`]): Those under the projection.
        per_sample_losses (`Callable`): Losses of a batch.
    """

    def __init__(
        self,
        steps: int,
        metrics: dict[str, list[float]],
        parameters: Parameters,
        per_sample_losses: PerSampleLosses,
    ):
        self._steps, self._metrics = steps, metrics
        self._parameters, self._per_sample_losses = parameters, per_sample_losses
        self._model: nn.Module | None = None
        self._retain: list[Mapping] = []
        self._before: dict[str, Tensor] = {}
        self._losses: Tensor | None = None
        self._step: StepGradients | None = None
        self._warned: set[str] = set()

    def watches(self, global_step: int) -> bool:
        """Whether the step after `global_step` steps is watched."""
        return self._steps > 0 and (global_step == 0 or (global_step + 1) % self._steps == 0)

    def begin(self, model: nn.Module, retain: list[Mapping]) -> None:
        """Before a watched step: losses and parameters as they are."""
        self._model, self._retain = model, retain
        self._losses = self._current_losses()
        self._before = {name: parameter.detach().clone() for name, parameter in self._parameters.stored.items()}

    def expect(self, step: StepGradients) -> None:
        """Takes the gradients of the watched step."""
        self._step = step

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        step, self._step = self._step, None
        before, self._before = self._before, {}
        if step is None:
            return
        changes = step.placement.gather_rows(self._current_losses() - self._losses)
        losses = step.placement.gather_rows(self._losses)
        self._metrics["retain_change"].append(changes.mean().item())
        self._metrics["retain_rises"].append((changes > _ROUNDING * losses.abs()).double().mean().item())
        self._metrics["largest_retain_rise"].append(changes.max().item())
        if step.outlives_combine:

            def moved() -> Iterator[tuple[str, Tensor]]:
                for name, parameter in self._parameters.stored.items():
                    yield name, self._parameters.whole(parameter.detach() - before[name])

            self._metrics["retain_change_predicted"].append(step.along(moved()).mean().item())
        self._model, self._retain, self._losses = None, [], None

    def on_log(self, args, state, control, logs=None, **kwargs):
        kept = (logs or {}).get("kept_signal")
        if kept is None:
            return
        if kept > IDLE:
            self._warn_once(
                "idle",
                f"The projection leaves {kept:.2%} of the forget gradient as it is: it is doing next to nothing. Retain "
                "gradients that have little to do with the forget gradient do not protect what it would harm. Use more "
                "retain samples per step, or ones that are nearer to the forget set.",
            )
        if kept < EXHAUSTED:
            self._warn_once(
                "exhausted",
                f"The projection leaves {kept:.2%} of the forget gradient: next to nothing is forgotten. Use fewer retain "
                "samples per step, train more parameters, or make sure that no retain sample says what a forget sample "
                "says.",
            )

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning(message)

    @torch.no_grad()
    def _current_losses(self) -> Tensor:
        with preserved_modes(self._model), preserved_random_state():
            self._model.eval()
            losses = [self._per_sample_losses(self._model, inputs).float() for inputs in self._retain]
        reshard(self._model)
        return torch.cat(losses)
