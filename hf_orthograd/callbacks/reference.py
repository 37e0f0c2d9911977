"""Losses of the forget set under the model a run started from, which bounded forget objectives compare with."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from ..data import Batch
from ..objectives import PerSampleLosses
from ..trials import preserved_modes


class ReferenceLosses(TrainerCallback, ExportableState):
    """Keeps one loss for each row of the forget set; it is saved in every checkpoint's trainer state.

    Computed once for a run, before its first step, in evaluation mode. With a fresh LoRA adapter these are the losses of
    the model with the adapter disabled.

    Attributes:
        losses (`list[float]`, *optional*): In nats, in the order of the forget set's rows.
    """

    def __init__(self):
        self.losses: list[float] | None = None
        self._on_device: Tensor | None = None

    def state(self) -> dict:
        return {"args": {}, "attributes": {"losses": self.losses}}

    def begin_run(
        self,
        state: TrainerState,
        model: nn.Module,
        per_sample_losses: PerSampleLosses,
        batches: Iterable[Batch],
        num_rows: int,
    ) -> None:
        """Takes the losses from the checkpoint that a run goes on from, or those of the model that it starts with.

        Args:
            batches (`Iterable[Batch]`): The forget set, with row numbers.
            num_rows (`int`): Its length.

        Raises:
            ValueError: The run has already changed the model, and its checkpoint holds no losses.
        """
        saved, self._on_device = state.stateful_callbacks.get(type(self).__name__), None
        if state.global_step > 0:
            self.losses = saved["attributes"]["losses"] if saved is not None else None
            if self.losses is None:
                raise ValueError(
                    "The checkpoint holds no reference losses, and the starting model is gone: it was saved with another "
                    "`forget_loss`. Resume with that one, or start from the beginning with forget_loss='npo'."
                )
            if len(self.losses) != num_rows:
                raise ValueError(
                    f"The checkpoint holds reference losses of {len(self.losses)} rows, but `forget_dataset` has {num_rows}: it "
                    "was saved with another. Resume with that one, or start from the beginning."
                )
            return
        rows, losses = [], []
        with preserved_modes(model), torch.no_grad():
            model.eval()
            for batch in batches:
                rows.append(batch.rows)
                losses.append(batch.losses(model, per_sample_losses))
        found = torch.cat(losses).tolist()
        by_row = dict(zip(torch.cat(rows).tolist(), found, strict=True))
        self.losses = [by_row[row] for row in range(len(by_row))]

    def of_rows(self, rows: Tensor) -> Tensor:
        """The losses of these rows, shape (len(rows),), where `rows` are."""
        if self._on_device is None or self._on_device.device != rows.device:
            self._on_device = torch.tensor(self.losses, device=rows.device)
        return self._on_device[rows]
