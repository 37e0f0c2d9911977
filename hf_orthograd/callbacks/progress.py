"""What a run shows on the screen."""

from transformers import ProgressCallback


SHOWN = {"forget_loss": "forget", "retain_loss": "retain", "kept_signal": "kept", "loss": "loss"}


class LossesBesideTheBar(ProgressCallback):
    """One bar with the newest losses (nats) beside it, where Trainer writes a line for each log and a bar for each evaluation."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            unlearns = "forget_loss" in logs
            shown = {
                SHOWN[key]: f"{logs[key]:.3g}" for key in SHOWN if key in logs and (key != "loss" or not unlearns)
            }
            if shown:
                self.training_bar.set_postfix(shown)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        """Draws nothing."""


def show_one_bar(trainer):
    """Puts [`LossesBesideTheBar`] in the place of a trainer's bar, if it has one, and returns the trainer."""
    bars = [one for one in trainer.callback_handler.callbacks if isinstance(one, ProgressCallback)]
    for bar in bars:
        trainer.remove_callback(bar)
    if bars:
        trainer.add_callback(LossesBesideTheBar)
    return trainer
