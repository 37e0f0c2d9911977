"""What the host needs to know of a step, brought there in one transfer: each would make the device wait."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batches import UNKNOWN_ROW, Batch
from .base import StepGradients


@dataclass(frozen=True)
class StepSummary:
    """Numbers of a step, on the host.

    Attributes:
        grams (`dict[str, torch.Tensor]`): Gram matrices, shape (1 + k, 1 + k), float64, on the CPU: that of each projected
            parameter, or, under the name "", their sum.
        forget_loss, retain_loss (`float`, *optional*): Means over the samples of all processes, in nats; `None` without
            samples.
        num_bad (`int`): How many losses are not finite, in all processes.
    """

    grams: dict[str, Tensor]
    forget_loss: float | None
    retain_loss: float | None
    num_bad: int

    @property
    def losses(self) -> dict[str, float]:
        """Those that there are, by the names that the log has."""
        both = {"forget_loss": self.forget_loss, "retain_loss": self.retain_loss}
        return {name: value for name, value in both.items() if value is not None}

    @property
    def gradients_are_finite(self) -> bool:
        return all(bool(torch.isfinite(gram).all()) for gram in self.grams.values())


def summarize_step(step: StepGradients, *, per_tensor: bool) -> StepSummary:
    """Brings a step's numbers to the host.

    Args:
        step ([`StepGradients`]): With several processes, all have to come here.
        per_tensor (`bool`): Whether the Gram matrix of each parameter is needed, or their sum.
    """
    losses = step.forget_losses, step.retain_losses
    dtype, device = torch.float64, step.forget_losses.device
    if device.type == "mps":
        dtype = torch.float32
    local = torch.stack([sum_of_losses.to(dtype) for own in losses for sum_of_losses in (own.sum(), _count(own))])
    bad = sum((~torch.isfinite(own)).sum() for own in losses)
    numbers = [step.group.sum(torch.cat((local, bad.to(dtype)[None])))]
    names = (list(step.grams) if per_tensor else [""]) if step.grams else []
    if names:
        stacked = torch.stack(list(step.grams.values()))
        numbers.append((stacked if per_tensor else stacked.sum(dim=0)).flatten().to(device))
    on_host = torch.cat(numbers).cpu().double()
    forget_sum, forget_count, retain_sum, retain_count, num_bad = on_host[:5].tolist()
    size = next(iter(step.grams.values())).shape[0] if names else 0
    return StepSummary(
        grams=dict(zip(names, on_host[5:].view(-1, size, size).unbind(), strict=True)) if names else {},
        forget_loss=forget_sum / forget_count if forget_count else None,
        retain_loss=retain_sum / retain_count if retain_count else None,
        num_bad=int(num_bad),
    )


def check_finite(
    step: StepGradients, summary: StepSummary, forget: list[Batch], retain: list[Batch], *, can_back_off: bool
) -> None:
    """Checks a step, in every process alike.

    Args:
        step ([`StepGradients`]): The step.
        summary ([`StepSummary`]): Its numbers on the host.
        forget, retain (`list[Batch]`): Its samples in this process, with row numbers.
        can_back_off (`bool`): Whether a gradient scaler can still make a gradient smaller that overflowed: then it passes,
            and the scaler skips the step.

    Raises:
        FloatingPointError: A loss is not finite, or a gradient is not; the message names the samples.
    """
    if summary.num_bad:
        sets = (("forget_dataset", step.forget_losses, forget), ("train_dataset", step.retain_losses, retain))
        bad = [
            f"{_name_rows(batches, ~torch.isfinite(losses))} of `{name}`"
            for name, losses, batches in sets
            if not torch.isfinite(losses).all()
        ]
        raise FloatingPointError(f"the loss is not finite for {' and '.join(bad) or 'samples of another process'}")
    if not summary.gradients_are_finite and not can_back_off:
        raise FloatingPointError("a gradient is not finite, though all losses are")


def _name_rows(batches: list[Batch], bad: Tensor) -> str:
    if any(batch.rows is None for batch in batches):
        return "unknown rows"
    rows = torch.cat([batch.rows for batch in batches])[bad].tolist()
    return f"rows {', '.join(map(str, rows))}" if UNKNOWN_ROW not in rows else "unknown rows"


def _count(losses: Tensor) -> Tensor:
    return torch.full((), len(losses), device=losses.device)
