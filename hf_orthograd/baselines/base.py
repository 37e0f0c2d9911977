"""What the methods share whose step descends losses of its own."""

import copy
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.utils import logging

from ..annotations import AnyDataset
from ..any_arguments import with_unlearning
from ..config import OrthoGradConfig
from ..data import Batch
from ..parallel.sharding import reshard
from ..trainer import OrthoGradTrainer
from ..trials import preserved_modes, preserved_random_state


logger = logging.get_logger(__name__)


class BaselineTrainer(OrthoGradTrainer):
    """A method whose step descends losses of its own on the step's forget and retain batches.

    `projection` and, unless the class says that it `keeps_objective`, `forget_loss` are not used: on the trainer's own
    copy of the arguments they are "none" and "ascent". What else a class does not read stands in its `unread`: a value that is
    not the default is warned of.

    Raises:
        ValueError: `args.projection_target` is "update", which corrects steps by a projection; or `args.forget_loss` is
            "refusal" where it would not be used. Or, from `train()`, the loss has no positions or divergence that it needs.
    """

    keeps_objective = False
    unread: tuple[str, ...] = ()  # names of arguments that weigh nothing here
    needs_positions = False  # of labels in the logits
    needs_divergence = False  # from a teacher's predictions

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *further: Any,
        forget_dataset: AnyDataset | None = None,
        **kwargs: Any,
    ):
        if forget_dataset is not None:
            args = OrthoGradConfig("tmp_trainer") if args is None else args
            args = copy.copy(with_unlearning(args))
            if args.projection_target == "update":
                raise ValueError(
                    f"{type(self).__name__} has no projection, but `projection_target` is 'update'. Set it to 'gradient'."
                )
            if args.forget_loss == "refusal" and not self.keeps_objective:
                raise ValueError(
                    f"{type(self).__name__} has a forget loss of its own, but `forget_loss` is 'refusal'. Leave it and "
                    "`refusal_labels` out."
                )
            args.projection = "none"
            args.forget_loss = args.forget_loss if self.keeps_objective else "ascent"
            self._warn_of_unread(args)
        super().__init__(model, args, *further, forget_dataset=forget_dataset, **kwargs)

    def _warn_of_unread(self, args: OrthoGradConfig) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(OrthoGradConfig)}
        for name in self.unread:
            value = getattr(args, name)
            if value != defaults[name]:
                logger.warning(
                    f"{type(self).__name__} does not read `{name}`: {value!r} changes nothing. Leave it out."
                )

    def begin_unlearning(self) -> None:
        if self.needs_divergence and not self.per_sample_loss.has_divergence:
            raise ValueError(
                f"{type(self).__name__} compares predictions with a teacher's, which is not known for a `compute_loss_func` of your "
                "own. Pass a `compute_divergence_func` beside it."
            )
        if self.needs_positions:
            model, batch = self.accelerator.unwrap_model(self.model), self.first_batch("forget_dataset", 1)
            with torch.no_grad(), preserved_modes(model), preserved_random_state(), self.accelerator.autocast():
                self.per_sample_loss.positions(model.eval()(**batch.inputs), batch.inputs)
            reshard(model)
        super().begin_unlearning()

    def forget_loss(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """What is descended on a forget batch, a scalar; None if this step leaves the forget set out."""
        raise NotImplementedError

    def retain_loss(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """What is descended on a retain batch, a scalar: by default what `retain_loss` asks for, in the mean over its samples."""
        _, terms = batch.losses_and_terms(model, self.per_sample_loss, self.retain_term)
        return terms.mean()

    def weigh(self, losses: dict[str, Tensor], forget: list[Batch], retain: list[Batch]) -> Tensor:
        """The scalar that a step descends, from "forget_loss" and "retain_loss", as far as there are such: their sum."""
        return sum(losses.values())

    def unlearning_loss(self, model: nn.Module, forget: list[Batch], retain: list[Batch]) -> Tensor:
        found = {
            "forget_loss": [self.forget_loss(model, batch) for batch in forget],
            "retain_loss": [self.retain_loss(model, batch) for batch in retain],
        }
        losses = {name: own[0] for name, own in found.items() if own and own[0] is not None}
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        self.record_losses(dict(zip(losses, self.accelerator.reduce(values, "mean").tolist(), strict=True)))
        return self.weigh(losses, forget, retain)

    def record_losses(self, values: dict[str, float]) -> None:
        """Takes the means over all processes for the log.

        Raises:
            FloatingPointError: One is not finite.
        """
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"`{name}` is not finite")
            self.record(name, value)


def refuse_shards(trainer: OrthoGradTrainer, why: str) -> None:
    """Refuses a launch under which no process has the whole gradient of a parameter.

    Raises:
        ValueError: It is FSDP or DeepSpeed.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            f"{why}, which a process does not have under {'FSDP' if trainer.is_fsdp_enabled else 'DeepSpeed'}. Launch "
            f"{type(trainer).__name__} in one process, or with DDP."
        )


def weigh_by_alpha(losses: dict[str, Tensor], alpha: float) -> Tensor:
    """`(1 - alpha) * forget_loss + alpha * retain_loss`, as far as there are such: what GradDiff weighs by."""
    weights = {"forget_loss": 1 - alpha, "retain_loss": alpha}
    return sum(weights[name] * loss for name, loss in losses.items())
