"""What a run shows on the screen."""

from typing import Any, TypeVar

from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments


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


def show_one_bar(trainer: AnyTrainer) -> AnyTrainer:
    """Puts [`LossesBesideTheBar`] in the place of a trainer's bar, if it has one, and returns the trainer."""
    bars = [one for one in trainer.callback_handler.callbacks if isinstance(one, ProgressCallback)]
    for bar in bars:
        trainer.remove_callback(bar)
    if bars:
        trainer.add_callback(LossesBesideTheBar)
    return trainer
