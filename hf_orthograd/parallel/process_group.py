"""What the processes of a run tell one another, so that a step is that of the union of their samples.

Every process has its own retain samples. The forget gradient is averaged over all forget samples; of the retain
gradients each process keeps its own, and only blocks of them travel, to be multiplied with everybody else's.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather, gather_object, reduce
from torch import Tensor


# numbers that are sent at once, as DDP's buckets of 25 MiB
_BUCKET = 25 << 18
Result = TypeVar("Result")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that make up a step; with one process every answer is one's own.

    Attributes:
        num_processes (`int`): How many take part.
        process_index (`int`): Which of them this is.
    """

    num_processes: int = 1
    process_index: int = 0

    @property
    def is_alone(self) -> bool:
        return self.num_processes == 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes of a tensor of the same shape in each."""
        return tensor if self.is_alone else reduce(tensor, "sum")

    def average(self, tensors: list[Tensor]) -> None:
        """Takes the mean over processes of many tensors, in place; small ones travel together."""
        bucket: list[Tensor] = []
        for number, tensor in enumerate(tensors):
            bucket.append(tensor)
            following = tensors[number + 1] if number + 1 < len(tensors) else None
            full = sum(map(Tensor.numel, bucket)) >= _BUCKET
            if following is None or full or following.dtype != tensor.dtype or following.device != tensor.device:
                flat = (
                    torch.cat([own.reshape(-1) for own in bucket]) if len(bucket) > 1 else tensor.contiguous().view(-1)
                )
                flat = self.sum(flat).div_(self.num_processes)
                for own, mean in zip(bucket, flat.split([own.numel() for own in bucket]), strict=True):
                    own.copy_(mean.view_as(own))
                bucket = []

    def gather_numbers(self, *numbers: int, device: torch.device) -> list[list[int]]:
        """The same few integers of every process, process by process. Waits for the device; alone it does not."""
        if self.is_alone:
            return [list(numbers)]
        return gather(torch.tensor([numbers], device=device)).tolist()

    def used_anywhere(self, names: Collection[str], used: Collection[str], device: torch.device) -> list[str]:
        """Those of `names`, the same in every process, that are among `used` in one process at least."""
        if self.is_alone:
            return [name for name in names if name in used]
        flags = self.sum(torch.tensor([float(name in used) for name in names], device=device)).tolist()
        return [name for name, flag in zip(names, flags, strict=True) if flag]

    def agree(self, decision: Any) -> Any:
        """What the first process decided, sent as an object: not for every step."""
        if self.is_alone:
            return decision
        decisions = [decision]
        broadcast_object_list(decisions)
        return decisions[0]

    def in_first(self, call: Callable[[], Result]) -> Result | None:
        """What the call gives in the first process, None in the others, which wait for it.

        Raises:
            RuntimeError: In the others, where it failed there; the first raises what was raised.
        """
        result, error = None, None
        if self.process_index == 0:
            try:
                result = call()
            except Exception as caught:  # raised below, once the others know
                error = caught
        failure = self.agree(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        if failure is not None:
            raise RuntimeError(f"The first process failed: {failure}")
        return result

    def all_equal(self, value: Any) -> bool:
        """Whether every process has the same object; not for every step."""
        return self.is_alone or len(set(gather_object([value]))) == 1

    def layout(self, count: int, device: torch.device) -> "SampleLayout":
        """Where this process' `count` samples stand among those of all processes."""
        counts = tuple(count for (count,) in self.gather_numbers(count, device=device))
        return SampleLayout(self, counts)


# one process by itself, also where others run: trials on a few samples are each process' own
ALONE = ProcessGroup()


@dataclass(frozen=True)
class SampleLayout:
    """The samples of all processes in one order, process by process.

    Attributes:
        group ([`ProcessGroup`]): The processes.
        counts (`tuple[int, ...]`): Samples of each process.
    """

    group: ProcessGroup
    counts: tuple[int, ...]

    @property
    def local(self) -> int:
        """Number of samples of this process."""
        return self.counts[self.group.process_index]

    @property
    def total(self) -> int:
        """Number of samples of all processes."""
        return sum(self.counts)

    @property
    def span(self) -> slice:
        """The numbers of this process' samples."""
        start = sum(self.counts[: self.group.process_index])
        return slice(start, start + self.local)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """From this process' rows, (local, ...), to those of all processes, (total, ...)."""
        if self.group.is_alone:
            return rows
        longest = max(self.counts)
        padded = rows.contiguous()
        if len(rows) < longest:
            padded = torch.cat((rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])))
        gathered = gather(padded).unflatten(0, (self.group.num_processes, longest))
        return torch.cat([block[:count] for block, count in zip(gathered, self.counts, strict=True)])
