"""What the processes of a run tell one another, so that a step is that of the union of their samples.

Every process has its own retain samples. The forget gradient is averaged over all forget samples; of the retain
gradients each process keeps its own, and only blocks of them travel, to be multiplied with everybody else's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather, reduce
from torch import Tensor


@dataclass(frozen=True)
class Exchange:
    """Talks to the other processes; with one process every answer is one's own.

    Parameters:
        num_processes (`int`): How many processes take part.
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

    def agree(self, decision: Any) -> Any:
        """What the first process decided."""
        if self.is_alone:
            return decision
        decisions = [decision]
        broadcast_object_list(decisions)
        return decisions[0]

    def place(self, count: int, device: torch.device) -> "Placement":
        """Where this process' `count` samples stand among those of all processes."""
        if self.is_alone:
            return Placement(self, (count,))
        counts = gather(torch.tensor([count], device=device))
        return Placement(self, tuple(counts.tolist()))


@dataclass(frozen=True)
class Placement:
    """The samples of all processes in one order, process by process.

    Parameters:
        exchange ([`Exchange`]): The processes.
        counts (`tuple[int, ...]`): Samples of each process.
    """

    exchange: Exchange
    counts: tuple[int, ...]

    @property
    def own(self) -> int:
        """Samples of this process."""
        return self.counts[self.exchange.process_index]

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def span(self) -> slice:
        """The numbers of this process' samples."""
        start = sum(self.counts[: self.exchange.process_index])
        return slice(start, start + self.own)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """From this process' rows, (own, ...), to those of all processes, (total, ...)."""
        if self.exchange.is_alone:
            return rows
        longest = max(self.counts)
        padded = rows.contiguous()
        if len(rows) < longest:
            padded = torch.cat((rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])))
        gathered = gather(padded).unflatten(0, (self.exchange.num_processes, longest))
        return torch.cat([own[:count] for own, count in zip(gathered, self.counts, strict=True)])
