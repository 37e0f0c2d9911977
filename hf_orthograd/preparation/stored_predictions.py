"""What the starting model answers to retain samples, found once."""

from collections.abc import Callable, Iterable
from typing import cast

import psutil
import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ..data import Batch
from ..objectives import PerSampleLoss
from ..parallel import ProcessGroup


class StoredPredictions:
    """The starting model's logits where labels of the retain samples count: neither it nor a forward pass of it is needed again.

    Args:
        logits (`torch.Tensor`): Shape (N + 1, V), those of all samples one after the other, and a row that is not a number.
        counts (`torch.Tensor`): How many each sample has, shape (n,), by row number.
    """

    def __init__(self, logits: Tensor, counts: Tensor):
        self._logits, self._counts = logits, counts
        self._firsts = counts.cumsum(0) - counts

    def outputs(self, per_sample_loss: PerSampleLoss, batch: Batch) -> ModelOutput:
        """Those of a batch with row numbers, at the positions of its own padding: (B, L, V), of a classifier (B, V).

        What no label counts at is some other position's. A sample with another number of labels than it had has no predictions,
        and gets numbers that are none: the run then stops.

        Raises:
            ValueError: It has no row numbers.
        """
        if batch.rows is None:
            raise ValueError(
                "`precompute_ref_logits` is True, but a retain batch has no row numbers to find its predictions by. Leave it out, or "
                "keep the trainer's collator in a loader of your own."
            )
        rows, counted = batch.rows, per_sample_loss.counted(batch.inputs)
        if counted is None:
            return ModelOutput(logits=self._logits[self._firsts[rows]])
        places = self._firsts[rows, None] + (counted.cumsum(dim=1) - 1).clamp(min=0)
        same = counted.sum(dim=1) == self._counts[rows]
        return ModelOutput(logits=self._logits[torch.where(same[:, None], places, len(self._logits) - 1)])

    @classmethod
    def find(
        cls,
        answer: Callable[[Batch], ModelOutput],
        per_sample_loss: PerSampleLoss,
        batches: Iterable[Batch],
        num_rows: int,
        group: ProcessGroup,
    ) -> "StoredPredictions":
        """Runs the starting model.

        Args:
            answer (`Callable`): What it answers to a batch.
            batches (`Iterable[Batch]`): Of this process, as many as in each other; together they hold each row, some more than once.

        Raises:
            ValueError: A row that was read twice had another number of labels, or there is no room for so many predictions.
        """
        parts, counts = [], torch.zeros(2, num_rows, dtype=torch.long)
        for batch in batches:
            logits, numbers = per_sample_loss.counted_logits(answer(batch), batch.inputs)
            rows = cast(Tensor, batch.rows)
            counts = counts.to(logits.device)
            counts[0, rows], counts[1, rows] = numbers, 1
            parts.append((rows, numbers, _compact(logits)))
            _check_room(sum(part.numel() for *_, part in parts), parts[0][2], group)
        own, first = counts[0], parts[0][2]
        in_full = group.sum(torch.tensor(sum(part.dtype == torch.float32 for *_, part in parts), device=first.device))
        dtype = torch.float32 if in_full > 0 else first.dtype
        totals = group.sum(counts)
        found = totals[0] // totals[1]
        if group.sum((own != found * counts[1]).sum()) > 0:
            raise ValueError(
                "`precompute_ref_logits` is True, but rows of `train_dataset` have other labels when they are read again. Leave it out, "
                "or keep them from varying."
            )
        # of several processes one holds some rows, and each gets all
        kept = dtype if group.is_alone else torch.float32
        table = torch.zeros(int(found.sum()) + 1, first.shape[-1], device=first.device, dtype=kept)
        times = torch.zeros(len(table), 1, device=first.device)
        firsts = found.cumsum(0) - found
        while parts:
            rows, numbers, logits = parts.pop()
            before = numbers.cumsum(0) - numbers  # in this batch
            places = torch.repeat_interleave(firsts[rows] - before, numbers) + torch.arange(
                len(logits), device=rows.device
            )
            table[places], times[places] = logits.to(kept), 1
        if not group.is_alone:
            table = group.sum(table).div_(group.sum(times).clamp(min=1)).to(dtype)
        table[-1] = torch.nan
        return cls(table, found)


def _compact(logits: Tensor) -> Tensor:
    """In 2 bytes where that changes nothing: what mixed precision computed has been cast to float32 since."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(logits.to(dtype).float(), logits.float()):
            return logits.to(dtype)
    return logits.float()


def _check_room(numbers: int, logits: Tensor, group: ProcessGroup) -> None:
    """Whether a table of what all processes have found so far fits beside it into the free memory of each.

    Args:
        numbers (`int`): That this process has found.
        logits (`torch.Tensor`): Some of them, (N, V).

    Raises:
        ValueError: It does not, in some process.
    """
    device = logits.device
    total = int(group.sum(torch.tensor(numbers, device=device)))
    needed = total * (logits.element_size() if group.is_alone else 4)
    free = min(own for (own,) in group.gather_numbers(free_memory(device), device=device))
    if needed > free:
        raise ValueError(
            f"`precompute_ref_logits` is True, but there is no room for the predictions on `train_dataset`: the table of {total / logits.shape[-1]:.0f} "
            f"labels that were read so far takes {needed / 2**30:.2g} GiB, {logits.shape[-1]} numbers each. {free / 2**30:.2g} GiB of {device.type} "
            f"memory are free{'' if group.is_alone else ' in the process that has least'}. Leave it out, or take fewer or shorter rows."
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, or in the host's memory where that cannot be told."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved
