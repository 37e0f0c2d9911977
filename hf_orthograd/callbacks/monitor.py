"""What the steps really do to the retain samples, beside what was predicted."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..data import Batch
from ..gradients import StepGradients
from ..objectives import PerSampleLosses
from ..parallel import Parameters
from ..parallel.sharding import reshard
from ..trials import preserved_modes, preserved_random_state
from .observer import Record, StepObserver


logger = logging.get_logger(__name__)

# shares of the forget gradient's norm outside of which the projection is doing nothing, or everything
IDLE, EXHAUSTED = 0.999, 0.01
# relative rise of a loss that rounding of float32 alone can make
_ROUNDING = 1e-6


class UnlearningMonitor(StepObserver):
    """Logs how the losses of a step's retain samples changed, and warns when the projection does nothing or everything.

    A step that is watched costs two more forward passes over its retain samples, in evaluation mode, and where a change is
    predicted a copy of the projected parameters. For each are recorded

    - "retain_change": the mean change of the retain losses, in nats,
    - "retain_rises": the share of retain samples whose loss rose,
    - "largest_retain_rise": the largest change among them, in nats,
    - "retain_change_predicted": to first order, `mean_i <g_i, change of the parameters>`, where the gradients `g_i` are kept
      until the step is made (not under activation checkpointing of full parameters, nor in chunks, nor without a
      projection).

    Args:
        steps (`int`, *optional*): Every how many steps one is watched, and the first; 0 for none. The run's logging steps
            by default.
        record (`Callable`): Takes what is to be logged.
    """

    def __init__(self, steps: int | None, record: Record):
        super().__init__(record)
        self._asked_steps, self._steps = steps, 0
        self._parameters: Parameters | None = None
        self._per_sample_losses: PerSampleLosses | None = None
        self._model: nn.Module | None = None
        self._retain: list[Batch] = []
        self._before: dict[str, Tensor] = {}
        self._losses: Tensor | None = None
        self._step: StepGradients | None = None
        self._warned: set[str] = set()

    def attach(self, parameters: Parameters, per_sample_losses: PerSampleLosses, logging_steps: int) -> None:
        self._parameters, self._per_sample_losses = parameters, per_sample_losses
        self._steps = logging_steps if self._asked_steps is None else self._asked_steps
        self._warned.clear()
        self._let_go()

    def _let_go(self) -> None:
        """Of what a step left behind that was never made."""
        self._model, self._retain, self._losses, self._step, self._before = None, [], None, None, {}

    def watches(self, global_step: int) -> bool:
        return self._steps > 0 and (global_step == 0 or (global_step + 1) % self._steps == 0)

    def begin_step(self, model: nn.Module, retain: list[Batch]) -> None:
        self._model = model
        losses = self._losses_of(retain)
        # without a projection each micro-batch of a step comes by itself
        self._losses = losses if self._losses is None else torch.cat((self._losses, losses))
        self._retain = [*self._retain, *retain]

    def take_gradients(self, step: StepGradients) -> None:
        self._step = step
        if step.has_retain_gradients:  # without them nothing is predicted
            self._before = {name: parameter.detach().clone() for name, parameter in self._parameters.stored.items()}

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, self._step = self._step, None
        before, self._before = self._before, {}
        if step is None:
            self._let_go()
            return
        changes = self._losses_of(self._retain) - self._losses
        rises = changes > _ROUNDING * self._losses.abs()
        layout = step.group.layout(len(changes), changes.device)
        changes, rises = layout.gather_rows(torch.stack((changes, rises.to(changes.dtype)), dim=1)).unbind(dim=1)
        numbers = {"retain_change": changes.mean(), "retain_rises": rises.mean(), "largest_retain_rise": changes.max()}
        if step.has_retain_gradients:

            def moved() -> Iterator[tuple[str, Tensor]]:
                for name, parameter in self._parameters.stored.items():
                    yield name, self._parameters.whole(parameter.detach() - before[name])

            numbers["retain_change_predicted"] = step.along(moved()).mean()
        # in one piece: each number alone would make the device wait
        values = torch.stack([number.float() for number in numbers.values()]).tolist()
        for name, value in zip(numbers, values, strict=True):
            self.record(name, value)
        self._let_go()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
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

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)

    @torch.no_grad()
    def _losses_of(self, batches: list[Batch]) -> Tensor:
        with preserved_modes(self._model), preserved_random_state():
            self._model.eval()
            losses = [batch.losses(self._model, self._per_sample_losses).float() for batch in batches]
        reshard(self._model)
        return torch.cat(losses)
