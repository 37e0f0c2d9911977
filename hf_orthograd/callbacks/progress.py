"""What a run shows on the screen, and how long it took."""

import time
from typing import Any, TypeVar

from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)

SHOWN = {"forget_loss": "forget", "retain_loss": "retain", "kept_signal": "kept", "loss": "loss"}


class LossesBesideTheBar(ProgressCallback):
    """One bar with the newest losses (nats) beside it, where Trainer writes a line for each log and a bar for each evaluation."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            unlearns = "forget_loss" in logs
            shown = {
                SHOWN[key]: f"{logs[key]:.3g}" for key in SHOWN if key in logs and (key != "loss" or not unlearns)
            }
            if shown:
                self.training_bar.set_postfix(shown)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        """Draws nothing."""


class TrainingClock(TrainerCallback, ExportableState):
    """Says in every checkpoint how long the run has taken so far: Trainer counts from where it goes on.

    Attributes:
        earlier (`float`): Seconds of training up to the checkpoint that the run goes on from; 0 of one that began anew, or whose
            checkpoint does not say it.
    """

    def __init__(self):
        self.earlier = 0.0
        self._started: float | None = None

    def state(self) -> dict:
        since = 0.0 if self._started is None else time.perf_counter() - self._started
        return {"args": {}, "attributes": {"seconds": self.earlier + since}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self.earlier, self._started = saved["attributes"]["seconds"] if saved else 0.0, time.perf_counter()
        # a checkpoint without it is saved no further otherwise: Trainer looks for those that it knows of
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())


def show_one_bar(trainer: AnyTrainer) -> AnyTrainer:
    """Puts [`LossesBesideTheBar`] in the place of a trainer's bar, if it has one, and returns the trainer."""
    bars = [one for one in trainer.callback_handler.callbacks if isinstance(one, ProgressCallback)]
    for bar in bars:
        trainer.remove_callback(bar)
    if bars:
        trainer.add_callback(LossesBesideTheBar)
    return trainer
