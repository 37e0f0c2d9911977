"""Batches that know which samples they hold, and how many: an error can name the sample, and none is counted twice."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..annotations import TrainDataset
from ..objectives import PerSampleLosses


SAMPLE_INDEX = "sample_index"
# in place of a row number where a stream has none
UNKNOWN_ROW = -1


@dataclass
class Batch:
    """Some samples, as a collator made them.

    Attributes:
        inputs (`Mapping`): Their inputs, with labels.
        size (`int`): How many samples they are, which no shape of a tensor tells for every model.
        rows (`torch.Tensor`, *optional*): Their numbers in the data set, shape (size,); -1 where they have none.
    """

    inputs: Mapping
    size: int
    rows: Tensor | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, inputs: Mapping) -> "Batch":
        """Takes off the row numbers that a [`RowSource`] gave a batch; without them its labels are counted.

        Raises:
            ValueError: It has neither.
        """
        inputs = dict(inputs)
        rows = inputs.pop(SAMPLE_INDEX, None)
        counted = inputs.get("labels") if rows is None else rows
        if not isinstance(counted, Tensor):
            raise ValueError(
                f"A batch has neither {SAMPLE_INDEX!r} nor 'labels' to count its samples by; it has "
                f"{', '.join(inputs)}. A loader of your own should keep the trainer's collator."
            )
        return cls(inputs, len(counted), rows=rows)

    def losses(self, model: nn.Module, per_sample_losses: PerSampleLosses) -> Tensor:
        """Runs the model; one loss for each sample, shape (size,).

        Raises:
            ValueError: The losses are not as many as the samples.
        """
        return self._checked(per_sample_losses(model, self.inputs))

    def losses_and_terms(
        self, model: nn.Module, per_sample_losses: PerSampleLosses, term: Callable | None
    ) -> tuple[Tensor, Tensor]:
        """The same, beside what is descended on retain samples, both of shape (size,): the losses themselves, or those of `term`."""
        if term is None:
            losses = self._checked(per_sample_losses(model, self.inputs))
            return losses, losses
        losses, terms = term(model, self)
        return self._checked(losses), self._checked(terms)

    def _checked(self, losses: Tensor) -> Tensor:
        if losses.shape != (self.size,):
            raise ValueError(
                f"A batch of {self.size} samples gave losses of shape {tuple(losses.shape)}: there must be one for each "
                "sample. A collator that joins samples into one row (padding-free) hides which is which: use one that pads."
            )
        return losses


class IndexedDataset(torch.utils.data.Dataset):
    """A data set whose examples carry their row number."""

    def __init__(self, dataset: Sequence):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self._dataset[index]


def _collated(collator: Callable, examples: list) -> MutableMapping:
    if isinstance(collator, ChangingCollator):  # whose change has errors of its own
        return collator(examples)
    try:
        return collator(examples)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"`data_collator` cannot make a batch of {len(examples)} rows: {error} If they differ in length, pass one that pads, as "
            "`DataCollatorForSeq2Seq(tokenizer)` does with text and its labels."
        ) from error


class IndexedCollator:
    """Collates examples of an [`IndexedDataset`] and adds their row numbers to the batch, shape (number of examples,)."""

    def __init__(self, collator: Callable):
        self._collator = collator

    def __call__(self, features: list) -> MutableMapping:
        indices, examples = zip(*features, strict=True)
        batch = _collated(self._collator, list(examples))
        batch[SAMPLE_INDEX] = torch.tensor(indices)
        return batch


class CountingCollator:
    """The same for examples without a row number, as those of a stream are."""

    def __init__(self, collator: Callable):
        self._collator = collator

    def __call__(self, features: list) -> MutableMapping:
        batch = _collated(self._collator, features)
        batch[SAMPLE_INDEX] = torch.full((len(features),), UNKNOWN_ROW)
        return batch


class ChangingCollator:
    """Collates, and changes the batch.

    Args:
        collator (`Callable`): Makes it of examples.
        change (`Callable`): Maps it to another.
    """

    def __init__(self, collator: Callable, change: Callable[[Mapping], MutableMapping]):
        self._collator, self._change = collator, change

    def __call__(self, features: list) -> MutableMapping:
        return self._change(_collated(self._collator, features))


class RowSource:
    """A data set with its collator: where batches with row numbers come from.

    Args:
        dataset (`torch.utils.data.Dataset` or `datasets.Dataset`): Rows by number, or a stream.
        collator (`Callable`): Makes a batch of rows.
        name (`str`): Of the argument that it was, in messages.

    Attributes:
        is_indexed (`bool`): Whether it has rows by number; those of a stream are only counted.
        dataset, collator: What a loader is to be made of.
    """

    def __init__(self, dataset: TrainDataset, collator: Callable, name: str):
        self.is_indexed, self._name = hasattr(dataset, "__len__"), name
        self.dataset = IndexedDataset(dataset) if self.is_indexed else dataset
        self.collator = IndexedCollator(collator) if self.is_indexed else CountingCollator(collator)

    def first(self, count: int, start: int = 0) -> Mapping:
        """A batch of `count` rows from the beginning, or as many as there are, after leaving out `start`.

        Raises:
            ValueError: There are none, or the collator cannot make a batch of them.
        """
        if self.is_indexed:
            # a set of one row has no second: the first stands for it
            start = min(start, len(self.dataset) - 1)
            examples = [self.dataset[row] for row in range(start, min(start + count, len(self.dataset)))]
        else:
            examples = list(islice(self.dataset, start, start + count))
        if not examples:
            raise ValueError(f"`{self._name}` is a stream that gave no rows. Check where it reads from.")
        return self.collator(examples)


class PairedBatches(dict):
    """The batches of an unlearning step, in two lists: "forget" and "retain", empty if the update needs none.

    Trainer moves it to the device as it does any mapping: it makes a new one of the same class.
    """

    def __init__(self, batches: Mapping[str, list] | None = None):
        super().__init__({"forget": [], "retain": []} if batches is None else batches)
