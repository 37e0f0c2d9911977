"""Training on after unlearning, without bringing back what was forgotten."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, default_data_collator
from transformers.utils import logging

from ..annotations import AnyDataset
from ..objectives import PerSampleLoss
from ..parallel import ProcessGroup
from ..parallel.sharding import is_sharded
from ..trials import preserved_modes, preserved_random_state


logger = logging.get_logger(__name__)
_LEVELS = "forgotten_levels"  # in the trainer's state, and so in its checkpoints


@dataclass(frozen=True)
class Watched:
    """What the rows' losses were after a step.

    Attributes:
        step (`int`): Of the training that goes on.
        loss (`float`): Their mean, in nats.
        fallen (`float`): By how much it is below the mean level, as a share of that.
    """

    step: int
    loss: float
    fallen: float


class StaysForgotten(TrainerCallback):
    """Watches what was forgotten while any [`~transformers.Trainer`] trains on, and with `hold` keeps it away.

    Held, each optimizer step's gradient g loses what would lower the mean loss of those of some forgotten rows that are at
    their level or below: `g - max(0, <g, f>) / <f, f> f`, with f the gradient of that loss. This is the projection of A-GEM
    (arXiv 1812.00420, equation 11), turned round. Rows above their level may fall to it. Rows below it are pushed
    back, by the gradient of `mean(max(0, level - loss)^2 / (2 level))`, which clipping does not reach. Momentum and Adam's
    scaling bend what the projection leaves: at a high learning rate the rows' loss jumps around its level. This takes one more forward
    and backward pass of `batch_size` rows a step and process. Levels stand in the trainer's state, and so in checkpoints:
    these stay with the owner.

    Args:
        dataset (`Dataset`): Rows that were forgotten; or, if they were deleted, others that tell as much, as paraphrases.
        data_collator (`Callable`, *optional*): Makes batches of rows; [`~transformers.default_data_collator`] by default.
        levels (`float` or array of shape (n,), *optional*): Losses not to fall below, in nats, as they were stored; by default those
            of the model when training begins.
        hold (`bool`): Whether to keep the rows' losses up, and not only to watch them.
        watch_steps (`int`, *optional*): Every how many steps the rows are measured, beside the first and the last; `logging_steps` by
            default.
        tolerance (`float`): Share of the mean level that the mean loss may lose before a warning.
        batch_size (`int`): Rows that a step holds, and that are measured at once.
        compute_loss_func (`Callable`, *optional*): As in [`OrthoGradTrainer`], for a model whose loss per sample is not known.

    Attributes:
        history (`list[Watched]`): What was seen.

    Raises:
        ValueError: There are no rows, or values out of range. At the start of training: checkpoints would be pushed; or `hold` is
            set under FSDP, DeepSpeed or fp16.
    """

    def __init__(
        self,
        dataset: AnyDataset,
        data_collator: Callable = default_data_collator,
        *,
        levels: float | np.ndarray | None = None,
        hold: bool = False,
        watch_steps: int | None = None,
        tolerance: float = 0.1,
        batch_size: int = 8,
        compute_loss_func: Callable | None = None,
    ):
        if len(dataset) == 0:
            raise ValueError("`dataset` is empty: there is nothing to watch.")
        for name, value in (("watch_steps", watch_steps), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be 1 or more, but is {value}.")
        if not 0 <= tolerance <= 1:
            raise ValueError(f"`tolerance` is a share from 0 to 1, but is {tolerance}.")
        if levels is not None and not np.all(np.asarray(levels) > 0):
            raise ValueError(f"`levels` are losses in nats, above 0, but the least is {np.min(levels):g}.")
        if levels is not None and np.ndim(levels) and len(levels) != len(dataset):
            raise ValueError(
                f"`levels` has {len(levels)} losses for {len(dataset)} rows: pass one for each, or one number."
            )
        self._dataset, self._collator, self._given = dataset, data_collator, levels
        self._hold, self._watch_steps, self._tolerance = hold, watch_steps, tolerance
        self._batch_size, self._loss_func = min(batch_size, len(dataset)), compute_loss_func
        self._levels: Tensor | None = None
        self.history: list[Watched] = []

    # `model` is always there: None is for TrainerCallback, which names no argument beyond `control`
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if self._hold and (is_sharded(model) or args.fsdp or args.deepspeed):
            raise ValueError(
                "`hold` is True, but FSDP and DeepSpeed give each process a part of the gradient, or keep it. Leave it out."
            )
        if self._hold and args.fp16:
            raise ValueError(
                "`hold` is True, but fp16 scales losses, which the gradients added here are not. Set `bf16`."
            )
        if args.push_to_hub and "checkpoint" in str(getattr(args.hub_strategy, "value", args.hub_strategy)):
            raise ValueError(
                f"`hub_strategy` is {str(args.hub_strategy)!r}, which pushes checkpoints, and in them losses of what was forgotten. Set "
                "it to 'end'."
            )
        self._losses_of = PerSampleLoss(model, self._loss_func)
        self._order = torch.randperm(len(self._dataset), generator=torch.Generator().manual_seed(args.seed))
        found = state.stateful_callbacks.get(_LEVELS, self._given)  # of a run that goes on, those it began with
        found = self._measure(model) if found is None else torch.as_tensor(found, dtype=torch.float32)
        self._levels = found.expand(len(self._dataset)).to(args.device)
        state.stateful_callbacks[_LEVELS] = self._levels.tolist()
        self.history.clear()
        self._watch(state.global_step, self._measure(model).mean().item())

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if not self._hold:
            return
        first = (state.global_step * args.world_size + args.process_index) * self._batch_size
        rows = [int(self._order[(first + place) % len(self._order)]) for place in range(self._batch_size)]
        trained = [
            parameter for parameter in model.parameters() if parameter.requires_grad and parameter.grad is not None
        ]
        with preserved_modes(model), preserved_random_state():
            model.eval()
            losses = self._losses(model, rows)
            missing = self._levels[rows] - losses
            # in proportion to what is missing: a push that stays whole until the level is reached carries rows far past it
            levels = self._levels[rows].clamp(min=torch.finfo(torch.float32).tiny)  # a loss may be 0
            lifted = (missing.relu().square() / (2 * levels)).mean()
            # both from one graph, which the second frees
            low = (losses * (missing.detach() >= 0)).mean()
            falls = torch.autograd.grad(low, trained, retain_graph=True, allow_unused=True)
            lifts = torch.autograd.grad(lifted, trained, allow_unused=True)
        group = ProcessGroup(args.world_size, args.process_index)
        falls, lifts = (
            [torch.zeros_like(p) if own is None else own for p, own in zip(trained, found, strict=True)]
            for found in (falls, lifts)
        )
        group.average([*falls, *lifts])
        _project([parameter.grad for parameter in trained], falls)
        torch._foreach_add_([parameter.grad for parameter in trained], lifts)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        every = self._watch_steps or max(1, int(state.logging_steps))
        if state.global_step % every == 0:
            self._watch(state.global_step, self._measure(model).mean().item())

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if self.history[-1].step != state.global_step:
            self._watch(state.global_step, self._measure(model).mean().item())

    def _watch(self, step: int, loss: float) -> None:
        level = self._levels.mean().item()
        fallen = (level - loss) / level
        was_low = bool(self.history) and self.history[-1].fallen > self._tolerance
        self.history.append(Watched(step, loss, fallen))
        if fallen > self._tolerance and not was_low:
            logger.warning(
                f"What was forgotten is coming back: after step {step} the loss of its rows is {loss:.3f}, {fallen:.0%} below "
                f"{level:.3f}. Look for them in the new data by `check_dataset`; `hold=True` keeps them away."
            )

    def _measure(self, model: nn.Module) -> Tensor:
        """The losses of all rows, shape (n,)."""
        starts = range(0, len(self._dataset), self._batch_size)
        with preserved_modes(model), preserved_random_state(), torch.no_grad():
            model.eval()
            parts = [
                self._losses(model, range(start, min(start + self._batch_size, len(self._dataset))))
                for start in starts
            ]
        return torch.cat(parts).float()

    def _losses(self, model: nn.Module, rows) -> Tensor:
        device = next(model.parameters()).device
        batch = self._collator([self._dataset[row] for row in rows])
        inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
        return self._losses_of(model, inputs)


def _project(gradients: list[Tensor], falls: list[Tensor]) -> None:
    """Takes out of gradients what a step along them would lower the loss by that `falls` is the gradient of, in place."""
    dots = torch.stack(
        [torch.sum(own.float() * fall.float()) for own, fall in zip(gradients, falls, strict=True)]
    ).sum()
    squares = torch.stack(torch._foreach_norm(falls, 2, dtype=torch.float32)).square().sum()
    # on the device: to look at the sign would make it wait
    share = (dots / squares.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=0)
    for own, fall in zip(gradients, falls, strict=True):
        own.copy_(own.float() - share * fall.float())
