"""What a run keeps of the model it started from: losses that bounded objectives compare with, and a sign to know it by."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import CallbackHandler, ExportableState

from ..config import OrthoGradConfig
from ..data import Batch
from ..objectives import ForgetObjective, PerSampleLosses, forget_objective
from ..trials import preserved_modes
from .observer import find_callback


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
            ValueError: A loss is not finite, or the run has already changed the model, and its checkpoint holds no losses.
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
        for row, loss in enumerate(self.losses):
            if not math.isfinite(loss):
                raise ValueError(
                    f"Row {row} of `forget_dataset` has the loss {loss} under the starting model, with which forget_loss='npo' compares. Remove "
                    "it: no label counts there, or an utterance is shorter than its transcript. If the collator masks tokens anew "
                    "each time, mask them once, by `map`."
                )

    def of_rows(self, rows: Tensor) -> Tensor:
        """The losses of these rows, shape (len(rows),), where `rows` are."""
        if self._on_device is None or self._on_device.device != rows.device:
            self._on_device = torch.tensor(self.losses, device=rows.device)
        return self._on_device[rows]


def objectives_of(batches: list[Batch], args: OrthoGradConfig, handler: CallbackHandler) -> list[ForgetObjective]:
    """What is ascended on forget batches, with row numbers; "npo" has the reference losses of the run."""
    reference = find_callback(handler, ReferenceLosses)
    return [
        forget_objective(
            args.forget_loss,
            beta=args.npo_beta,
            gamma=args.simnpo_gamma,
            reference_losses=None if reference is None else reference.of_rows(batch.rows),
        )
        for batch in batches
    ]


class StartingFingerprint(TrainerCallback, ExportableState):
    """Says in every checkpoint which model a run started from, so that it goes on beside the same one.

    Attributes:
        numbers (`list[float]`, *optional*): As [`StartingModel.fingerprint`] has them.
    """

    def __init__(self):
        self.numbers: list[float] | None = None

    def state(self) -> dict:
        return {"args": {}, "attributes": {"numbers": self.numbers}}

    def begin_run(self, state: TrainerState, numbers: list[float], argument: str) -> None:
        """Takes those of the model that a run starts with, or compares them with those of the checkpoint it goes on from.

        Args:
            state (`TrainerState`): Of the run.
            numbers (`list[float]`): Of the model whose predictions it holds to.
            argument (`str`): By which that model was given.

        Raises:
            ValueError: They are others, or there are none.
        """
        saved, self.numbers = state.stateful_callbacks.get(type(self).__name__), numbers
        if state.global_step == 0:
            return
        if saved is None:
            raise ValueError(
                "The checkpoint does not say which model its run started from: it was saved with another `retain_loss`. Resume "
                "with that one, or start from the beginning with retain_loss='kl'."
            )
        before = saved["attributes"]["numbers"]
        if len(before) != len(numbers) or not torch.allclose(torch.tensor(before), torch.tensor(numbers), rtol=1e-3):
            raise ValueError(
                f"retain_loss='kl' holds predictions to those of the `{argument}` that the run began with, but this one is another. "
                "Pass the same, as it was when unlearning began, not the checkpoint's."
            )
