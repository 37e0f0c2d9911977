"""Methods that change gradients before they become a step: GRU."""

import torch
from torch import Tensor, nn

from ..data import Batch
from ..parallel import Parameters
from .base import BaselineTrainer


class GruTrainer(BaselineTrainer):
    """Gradient rectified unlearning (arXiv 2503.09117, section 3): the ascent, less what would raise the retain loss.

    Where a step along the forget gradient would raise the retain loss, to first order, its part along the retain gradient
    is taken out; where not, it stays. The retain gradient is that of the batch's mean, smoothed over steps. The rectified
    ascent is the whole step: there is no retain term.

    Args:
        smoothing (`float`): Share of the newest retain gradient in the smoothed one, the paper's gamma.

    Raises:
        ValueError: Steps are accumulated or losses scaled: what is rectified is the gradient of one batch.
    """

    def __init__(self, *args, smoothing: float = 0.8, **kwargs):
        super().__init__(*args, **kwargs)
        self._smoothing, self._retain_gradient = smoothing, None
        if self.forget_dataset is None:
            return
        if self.args.gradient_accumulation_steps > 1 or self.args.fp16:
            raise ValueError(
                f"GruTrainer rectifies the gradient of one batch in full, but `gradient_accumulation_steps` is "
                f"{self.args.gradient_accumulation_steps} and `fp16` {self.args.fp16}. Set them to 1 and False."
            )
        if not self.has_retain:
            raise ValueError("GruTrainer rectifies by retain samples, but `train_dataset` has none. Pass some.")

    def begin_unlearning(self) -> None:
        super().begin_unlearning()
        self._retain_gradient = None
        if self.state.global_step > 0:
            raise ValueError(
                "A run of GruTrainer cannot be resumed: its smoothed retain gradient is not saved. Start from the beginning."
            )

    def unlearning_loss(self, model: nn.Module, forget: list[Batch], retain: list[Batch]) -> Tensor:
        plain = self.accelerator.unwrap_model(model)
        trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
        losses, found = {}, {}
        for name, batches in (("forget_loss", forget), ("retain_loss", retain)):
            (batch,) = batches
            losses[name] = batch.losses(plain, self.per_sample_loss).mean()
            gradients = torch.autograd.grad(losses[name], list(trained.values()), materialize_grads=True)
            found[name] = [gradient.float() for gradient in gradients]
            self.group.average(found[name])
        newest, before = found["retain_loss"], self._retain_gradient
        if before is not None:
            newest = torch._foreach_lerp(before, newest, self._smoothing)
        self._retain_gradient = newest
        step = rectify(torch._foreach_neg(found["forget_loss"]), newest)
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        self.record_losses(dict(zip(losses, self.accelerator.reduce(values, "mean").tolist(), strict=True)))
        # the mean over processes of the same in each
        handed = Parameters(trained, {}).hand_over(dict(zip(trained, step, strict=True)), self.group)
        return handed - losses["forget_loss"].detach()


def rectify(descended: list[Tensor], retain_gradient: list[Tensor]) -> list[Tensor]:
    """What is descended, without its part against the retain gradient; as it is where it has none."""
    along = sum(torch.stack([(a * b).sum() for a, b in zip(descended, retain_gradient, strict=True)]))
    squared = sum(torch.stack([gradient.square().sum() for gradient in retain_gradient]))
    # no branch on a number that is on the device
    share = torch.where(squared > 0, along.clamp(max=0) / squared, torch.zeros_like(along))
    return [a - share * b for a, b in zip(descended, retain_gradient, strict=True)]
