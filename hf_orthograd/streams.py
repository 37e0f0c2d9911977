"""Two streams of batches in one trainer, retain and forget, whose samples can be named."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from .data import CyclingBatchSampler, IndexedCollator, IndexedDataset


class PairedStreams:
    """What [`OrthoGradTrainer`] adds to Trainer's data loading; it expects to be mixed into a Trainer.

    The retain stream is Trainer's own. What the forget stream holds is a pure function of seed and batch number, so that
    a run that resumes sees what the uninterrupted run saw, and several processes share one order.
    """

    def get_train_dataloader(self) -> DataLoader:
        """The retain stream, as in Trainer; with a forget set, its batches carry row numbers."""
        if self.forget_dataset is None or not hasattr(self.train_dataset, "__len__"):
            return super().get_train_dataloader()
        dataset, collator = self._indexed(self.train_dataset, "Training")
        with self._replaced("data_collator", collator):
            return self._get_dataloader(
                dataset=dataset,
                description="Training",
                batch_size=self._train_batch_size,
                sampler_fn=lambda _: self._get_train_sampler(self.train_dataset),
                is_training=True,
            )

    def _start_forget_stream(self) -> Iterator[Mapping] | None:
        if not self._has_retain:
            return None
        dataset, collator = self._indexed(self.forget_dataset, "Forget")
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = CyclingBatchSampler(
            len(dataset),
            args.per_device_forget_batch_size,
            seed,
            start=self._micro_batches_done(),
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        return iter(self._loader(dataset, collator, batch_sampler=sampler))

    def _reference_batches(self) -> Iterator[Mapping]:
        dataset, collator = self._indexed(self.forget_dataset, "Forget")
        for batch in self._loader(dataset, collator, batch_size=self.args.per_device_eval_batch_size):
            yield self._prepare_inputs(batch)

    def _loader(self, dataset, collator: Callable, **sampling) -> DataLoader:
        # a generator of its own: drawing from the global one would shift the dropout of the training steps
        return DataLoader(
            dataset,
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            generator=torch.Generator().manual_seed(self.args.seed),
            **sampling,
        )

    def _micro_batches_done(self) -> int:
        """Training steps, counted in micro-batches, that came before `state.global_step`."""
        if self.state.global_step == 0:
            return 0
        steps = len(self.callback_handler.train_dataloader)
        accumulation = self.args.gradient_accumulation_steps
        epochs, updates = divmod(self.state.global_step, -(-steps // accumulation))
        return epochs * steps + updates * accumulation

    def _indexed(self, dataset, description: str) -> tuple[IndexedDataset, IndexedCollator]:
        """The data set and collator that Trainer would use, with row numbers added."""
        if isinstance(dataset, Dataset):
            dataset, collator = self._remove_unused_columns(dataset, description), self.data_collator
        else:
            collator = self._get_collator_with_removed_columns(self.data_collator, description)
        return IndexedDataset(dataset), IndexedCollator(collator)

    @contextmanager
    def _replaced(self, attribute: str, value) -> Iterator[None]:
        original = getattr(self, attribute)
        setattr(self, attribute, value)
        try:
            yield
        finally:
            setattr(self, attribute, original)
