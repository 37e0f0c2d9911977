"""What the host needs to know of a step, brought there in one transfer: each would make the device wait."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batches import UNKNOWN_ROW, Batch
from ..objectives import ForgetObjective
from .base import StepGradients
from .products import accumulation_dtype


@dataclass(frozen=True)
class StepSummary:
    """Numbers of a step, on the host.

    Attributes:
        grams (`dict[str, torch.Tensor]`): Those of the step, float64, on the CPU.
        forget_loss, retain_loss (`float`, *optional*): Means over the samples of all processes, in nats; `None` without
            samples.
        num_bad (`int`): How many losses are not finite, in all processes.
        retain_term (`float`, *optional*): The mean of the retain terms of all samples, where they are known before the update.
    """

    grams: dict[str, Tensor]
    forget_loss: float | None
    retain_loss: float | None
    num_bad: int
    retain_term: float | None = None

    @property
    def losses(self) -> dict[str, float]:
        """Those that there are, by the names that the log has."""
        both = {"forget_loss": self.forget_loss, "retain_loss": self.retain_loss}
        return {name: value for name, value in both.items() if value is not None}

    @property
    def gradients_are_finite(self) -> bool:
        return all(bool(torch.isfinite(gram).all()) for gram in self.grams.values())


def summarize_step(step: StepGradients) -> StepSummary:
    """Brings a step's numbers to the host. With several processes, all have to come here."""
    losses = step.forget_losses, step.retain_losses
    device = step.forget_losses.device
    dtype = accumulation_dtype(device)
    # filled, not copied from the host: that would make the device wait
    counts = [torch.full((), len(own), dtype=dtype, device=device) for own in losses]
    bad = sum((~torch.isfinite(own)).sum() for own in losses)
    known = step.retain_terms if step.retain_terms is not None else losses[1][:0]
    sums = [own.sum(dtype=dtype) for own in (*losses, known.to(device))]
    numbers = [step.group.sum(torch.stack([*sums, bad.to(dtype), *counts]))]
    numbers += [gram.flatten().to(device) for gram in step.grams.values()]
    on_host = torch.cat(numbers).cpu().double()
    forget_sum, retain_sum, term_sum, num_bad, forget_count, retain_count = on_host[:6].tolist()
    sizes = [gram.shape[0] for gram in step.grams.values()]
    matrices = on_host[6:].split([size**2 for size in sizes])
    return StepSummary(
        grams={n: m.view(size, size) for n, m, size in zip(step.grams, matrices, sizes, strict=True)},
        forget_loss=forget_sum / forget_count if forget_count else None,
        retain_loss=retain_sum / retain_count if retain_count else None,
        num_bad=int(num_bad),
        retain_term=term_sum / retain_count if retain_count and step.retain_terms is not None else None,
    )


def mean_retain_term(step: StepGradients, summary: StepSummary) -> float:
    """The mean of the retain terms over the samples of all processes; all have to come here.

    Raises:
        FloatingPointError: It is not finite, though the losses are.
    """
    mean = summary.retain_term
    if mean is None:  # they came with the update
        terms = step.retain_terms
        sums = terms.sum(dtype=torch.float32), torch.full((), len(terms), dtype=torch.float32, device=terms.device)
        total, count = step.group.sum(torch.stack(sums)).tolist()
        mean = total / count
    if not math.isfinite(mean):
        raise FloatingPointError(
            "the divergence from the starting model is not finite, though all losses are; under `precompute_ref_logits` samples "
            "with another number of labels than they had are so, too"
        )
    return mean


def value_of(step: StepGradients, forget: list[Batch], objectives: list[ForgetObjective], alpha: float) -> Tensor:
    """GradDiff's loss, a scalar for the log: `alpha` times the mean retain term, less `1 - alpha` times what is ascended."""
    parts = zip(objectives, step.forget_losses.split([batch.size for batch in forget]), strict=True)
    ascent = sum(objective.value(own) * len(own) for objective, own in parts) / len(step.forget_losses)
    terms = step.retain_losses if step.retain_terms is None else step.retain_terms
    return alpha * (terms.mean() if len(terms) else 0.0) - (1 - alpha) * ascent


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
