"""The two streams of a step: retain batches that are always full, and forget batches without end."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers.trainer_utils import has_length, seed_worker
from transformers.utils import logging

from ..config import OrthoGradConfig
from ..parallel import ProcessGroup
from .batches import RowSource


logger = logging.get_logger(__name__)


def fill_last_batch(sampler: Sampler | None, length: int, step_size: int) -> Sampler | None:
    """Has the last step of an epoch protect as many retain samples as the others, by rows of another shuffle.

    Args:
        sampler (`torch.utils.data.Sampler`, *optional*): Trainer's own; only a shuffle is filled up.
        length (`int`): Rows of the retain set.
        step_size (`int`): Rows of a step, over processes and micro-batches. A smaller retain set stays as it is.
    """
    # by exact type: other samplers that shuffle, by length say, have an order of their own to keep
    if type(sampler) is not RandomSampler or length < step_size or length % step_size == 0:
        return sampler
    filled = -(-length // step_size) * step_size
    return RandomSampler(sampler.data_source, num_samples=filled, generator=sampler.generator)


def forget_batch_size(args: OrthoGradConfig, train_batch_size: int | None) -> int:
    """Forget samples of a device's batch, beside retain batches of `train_batch_size`, which may have shrunk; as asked if that is not known."""
    asked = args.per_device_forget_batch_size
    return max(1, asked * train_batch_size // args.train_batch_size) if train_batch_size else asked


class ForgetStream:
    """Batches of the forget set, shuffled anew at each pass, without end.

    What batch number n holds depends on the seed and n alone: a run that resumes sees what the uninterrupted run saw, and
    several processes share one order.

    Args:
        source ([`RowSource`]): The forget set and its collator.
        args ([`OrthoGradConfig`]): Batch size, workers, pinning, prefetching and seed.
        train_batch_size (`int`): Of the retain batches; where `auto_find_batch_size` has made them smaller than `args`
            asks, forget batches shrink alike.
        group ([`ProcessGroup`]): The batches of one number are consecutive parts of one order.
    """

    def __init__(self, source: RowSource, args: OrthoGradConfig, train_batch_size: int, group: ProcessGroup):
        self._source, self._args, self._group = source, args, group
        size, asked = forget_batch_size(args, train_batch_size), args.per_device_forget_batch_size
        if size < asked:
            logger.warning(f"Forget batches shrink as the retain batches do, from {asked} to {size} rows.")
        self._batch_size = min(size, len(self._source.dataset))
        self._batches: Iterator[Mapping] | None = None

    def start(self, global_step: int, retain_loader: DataLoader, accumulation: int) -> None:
        """Has the batch come next that follows on `global_step` steps.

        Args:
            retain_loader (`torch.utils.data.DataLoader`): Whose epochs say how many micro-batches steps have; those of a
                stream, which has no length, are taken to be full.
            accumulation (`int`): Micro-batches of a full step.
        """
        number = global_step * accumulation
        if has_length(retain_loader):
            epochs, updates = divmod(global_step, -(-len(retain_loader) // accumulation))
            number = epochs * len(retain_loader) + updates * accumulation
        seed = self._args.seed if self._args.data_seed is None else self._args.data_seed
        place = self._group.process_index, self._group.num_processes
        sampler = CyclingBatchSampler(len(self._source.dataset), self._batch_size, seed, number, *place)
        self._batches = iter(_loader(self._source, self._args, batch_sampler=sampler))

    def next_batch(self) -> dict:
        """On its way to the device, which need not wait for it: memory is pinned where there is one."""
        return send_to_device(dict(next(self._batches)), self._args.device, non_blocking=True)


def load_batches(
    source: RowSource, args: OrthoGradConfig, numbers: Sequence[Sequence[int]] | None = None
) -> Iterator[Mapping]:
    """Batches of the rows of these numbers; by default each row once, in order, in batches as those of evaluation."""
    sampling = {"batch_size": args.per_device_eval_batch_size} if numbers is None else {"batch_sampler": numbers}
    return iter(_loader(source, args, **sampling))


def _loader(source: RowSource, args: OrthoGradConfig, **sampling) -> DataLoader:
    return DataLoader(
        source.dataset,
        collate_fn=source.collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        # a generator of its own: drawing from the global one would shift the dropout of the training steps
        generator=torch.Generator().manual_seed(args.seed),
        **sampling,
    )


class CyclingBatchSampler(Sampler):
    """Endless shuffled batches of equal size.

    Args:
        length (`int`): Rows of the data set.
        batch_size (`int`): Rows per batch and process, at most `length`.
        seed (`int`): Of the shuffles; each pass over the data set has its own.
        start (`int`): Number of the first batch.
        process_index, num_processes (`int`): The batches of one number are consecutive parts of one order.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, start: int = 0, process_index: int = 0, num_processes: int = 1
    ):
        self._length, self._batch_size, self._seed, self._start = length, min(batch_size, length), seed, start
        self._process_index, self._num_processes = process_index, num_processes

    def __iter__(self) -> Iterator[list[int]]:
        number = self._start
        while True:
            yield self.batch(number)
            number += 1

    def batch(self, number: int) -> list[int]:
        """The rows of batch `number`."""
        first = (number * self._num_processes + self._process_index) * self._batch_size
        return [self._row(position) for position in range(first, first + self._batch_size)]

    def _row(self, position: int) -> int:
        shuffle, offset = divmod(position, self._length)
        return _shuffled(self._length, self._seed, shuffle)[offset]


@lru_cache(maxsize=4)
def _shuffled(length: int, seed: int, shuffle: int) -> list[int]:
    # mixed, not added: pass 1 of seed 0 is not to be pass 0 of seed 1
    mixed = seed if shuffle == 0 else int(np.random.SeedSequence((seed, shuffle)).generate_state(1, np.uint64)[0] >> 1)
    return torch.randperm(length, generator=torch.Generator().manual_seed(mixed)).tolist()
