"""Methods that keep a copy of the starting model as a teacher: SCRUB, Bad Teacher and UNDIAL."""

import copy
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.utils import ModelOutput, logging

from ..data import Batch
from ..objectives import IGNORED_LABEL, mean_where
from .base import BaselineTrainer, weigh_by_alpha


logger = logging.get_logger(__name__)


class TeacherTrainer(BaselineTrainer):
    """Keeps the model it starts from as a teacher: one more copy of the parameters."""

    needs_divergence = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.forget_dataset is not None and not self.has_retain:
            raise ValueError(
                f"{type(self).__name__} holds on to retain samples, but `train_dataset` has none. Pass some."
            )
        self.teacher = _frozen(self.model, self.args.device)

    @torch.no_grad()
    def answers(self, teacher: nn.Module, batch: Batch) -> ModelOutput:
        """Of a frozen model, in the precision of the one that is trained."""
        with self.accelerator.autocast():
            return teacher(**batch.inputs)

    def divergence(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
        """The mean over samples of KL(teacher || model)."""
        target = self.answers(teacher, batch)
        return self.per_sample_loss.divergences(model(**batch.inputs), target, batch.inputs).mean()


class ScrubTrainer(TeacherTrainer):
    """SCRUB (arXiv 2302.09880, equation 3): away from the original model on the forget set, towards it on the rest.

    Minimises `retain_weight * KL_retain + gamma * loss_retain - KL_forget`, KL being that of the original model's
    predictions to the model's. Steps alternate, where the paper alternates epochs: one of ascent on the forget set, then one
    on the retain set. The last ones are on the retain set alone: a `forget_target` may end a run before them, and is warned of.

    Args:
        retain_weight, gamma (`float`): The paper's alpha and gamma.
        forget_share (`float`): Share of all steps after which the forget set is left alone.
    """

    unread = ("alpha",)

    def __init__(
        self, *args: Any, retain_weight: float = 0.001, gamma: float = 0.99, forget_share: float = 0.7, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self._retain_weight, self._gamma, self._forget_share = retain_weight, gamma, forget_share
        if self.forget_dataset is not None and self.args.forget_target is not None:
            logger.warning(
                f"{type(self).__name__} ends in steps on the retain set alone, which make up for the ascent, but "
                "`forget_target` may end the run before them. Leave it out, and choose `max_steps`."
            )

    @property
    def _ascends(self) -> bool:
        return self.state.global_step % 2 == 0 and self.state.global_step < self._forget_share * self.state.max_steps

    def forget_loss(self, model: nn.Module, batch: Batch) -> Tensor | None:
        return -self.divergence(model, self.teacher, batch) if self._ascends else None

    def retain_loss(self, model: nn.Module, batch: Batch) -> Tensor | None:
        if self._ascends:
            return None
        own = super().retain_loss(model, batch)
        return self._retain_weight * self.divergence(model, self.teacher, batch) + self._gamma * own


class BadTeacherTrainer(TeacherTrainer):
    """Bad Teacher (arXiv 2205.08096, equation 3): towards an incompetent model on the forget set.

    Minimises the mean over the samples of both batches: on retain samples of KL from the original model's predictions,
    on forget samples of KL from those of a model with random weights.

    Args:
        incompetent (`torch.nn.Module`, *optional*): That model; one of the same configuration, drawn anew, by default.
    """

    unread = ("alpha", "retain_loss")

    def __init__(self, *args: Any, incompetent: nn.Module | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        drawn = type(base)(copy.deepcopy(base.config)) if incompetent is None else incompetent
        self.incompetent = _frozen(drawn, self.args.device)

    def forget_loss(self, model: nn.Module, batch: Batch) -> Tensor | None:
        return self.divergence(model, self.incompetent, batch)

    def retain_loss(self, model: nn.Module, batch: Batch) -> Tensor | None:
        return self.divergence(model, self.teacher, batch)

    def weigh(self, losses: dict[str, Tensor], forget: list[Batch], retain: list[Batch]) -> Tensor:
        sizes = {"forget_loss": forget[0].size, "retain_loss": retain[0].size}
        return sum(sizes[name] * loss for name, loss in losses.items()) / sum(sizes.values())


class UndialTrainer(TeacherTrainer):
    """UNDIAL (arXiv 2402.10052, equation 3): distils from the starting model with the memorised label's logit lowered.

    On forget samples it minimises the cross-entropy from `softmax(teacher logits - strength * one-hot label)`, the mean over
    a sample's positions; weights are `1 - alpha`, and `alpha` on the retain samples.

    Args:
        strength (`float`): By how much the logit of the label is lowered, the paper's gamma.
    """

    needs_divergence, needs_positions = False, True

    def __init__(self, *args: Any, strength: float = 10.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._strength = strength

    def forget_loss(self, model: nn.Module, batch: Batch) -> Tensor | None:
        target, labels = self.per_sample_loss.positions(self.answers(self.teacher, batch), batch.inputs)
        logits, _ = self.per_sample_loss.positions(model(**batch.inputs), batch.inputs)
        counted = labels != IGNORED_LABEL
        target = target.float()
        lowered = torch.full_like(target[..., :1], -self._strength)
        target = target.scatter_add(-1, labels.clamp(min=0)[..., None], lowered).softmax(-1)
        return mean_where(-(target * logits.float().log_softmax(-1)).sum(-1), counted).mean()

    def weigh(self, losses: dict[str, Tensor], forget: list[Batch], retain: list[Batch]) -> Tensor:
        return weigh_by_alpha(losses, self.args.alpha)


def _frozen(model: nn.Module, device: torch.device) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False).eval().to(device)
