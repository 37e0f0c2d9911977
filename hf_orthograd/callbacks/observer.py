"""How a callback takes part in an unlearning step, between its batches and the optimizer."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..data import Batch
from ..gradients import StepGradients
from ..objectives import PerSampleLosses
from ..parallel import Parameters


# takes the name of a quantity and its value in one step; the log shows the mean
Record = Callable[[str, float], None]
Found = TypeVar("Found", bound=TrainerCallback)


class StepObserver(TrainerCallback):
    """Sees the retain samples of a step before it, and their gradients after the inner products.

    Args:
        record (`Callable`): Takes what is to be logged.
    """

    def __init__(self, record: Record):
        self.record = record

    def attach(self, parameters: Parameters, per_sample_losses: PerSampleLosses, logging_steps: int) -> None:
        """Before the first step: what will be trained, and how often the run logs."""

    def watches(self, global_step: int) -> bool:
        """Whether the step after `global_step` steps is to be seen; its retain gradients are then kept if they can be."""
        raise NotImplementedError

    def begin_step(self, model: nn.Module, retain: list[Batch]) -> None:
        """Before the forward passes of a step that is watched."""

    def take_gradients(self, step: StepGradients) -> None:
        """After its inner products, before the optimizer."""
        raise NotImplementedError


class BeginCallback(TrainerCallback):
    """Calls a function when model, optimizer and state are ready, and no step was made yet."""

    def __init__(self, begin: Callable[[], None]):
        self._begin = begin

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin()


def find_callback(handler: CallbackHandler, kind: type[Found]) -> Found | None:
    """The one of that class among a trainer's callbacks, which resuming may have put in place of the first."""
    return next((callback for callback in handler.callbacks if isinstance(callback, kind)), None)
