"""Losses of the forget set under the model a run started from, which bounded forget objectives compare with."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler, ExportableState

from .data import SAMPLE_INDEX
from .gradients import preserved_modes
from .objectives import PerSampleLoss


class ReferenceLosses(TrainerCallback, ExportableState):
    """Keeps one loss for each row of the forget set; it is saved in every checkpoint's trainer state.

    Computed once, before the first step, in evaluation mode. With a fresh LoRA adapter these are the losses of the
    model with the adapter disabled.

    Parameters:
        losses (`list[float]`, *optional*): In nats, in the order of the forget set's rows.
    """

    def __init__(self):
        self.losses: list[float] | None = None

    @classmethod
    def of(cls, handler: CallbackHandler) -> "ReferenceLosses":
        """The one among a trainer's callbacks, which resuming may have put in place of the first."""
        return next(callback for callback in handler.callbacks if isinstance(callback, cls))

    def state(self) -> dict:
        return {"args": {}, "attributes": {"losses": self.losses}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step > 0 and saved is not None:
            self.losses = saved["attributes"]["losses"]

    def compute(
        self, model: nn.Module, per_sample_loss: PerSampleLoss, batches: Iterable[Mapping], global_step: int
    ) -> None:
        """Runs the model over the forget set; batches carry the row numbers.

        Raises:
            ValueError: The run has already changed the model.
        """
        if global_step > 0:
            raise ValueError(
                "The checkpoint holds no reference losses, and the starting model is gone: it was saved with another "
                "`forget_loss`. Resume with that one, or start from the beginning with forget_loss='npo'."
            )
        losses = {}
        with preserved_modes(model), torch.no_grad():
            model.eval()
            for batch in batches:
                batch = dict(batch)
                rows = batch.pop(SAMPLE_INDEX).tolist()
                losses.update(zip(rows, per_sample_loss(model, batch).tolist(), strict=True))
        self.losses = [losses[row] for row in range(len(losses))]
