"""Types that signatures of several modules name."""

from typing import TypeAlias

from datasets import Dataset as Table
from datasets import IterableDataset as TableStream
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import BaseImageProcessor, FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin


# rows by number, of torch or of datasets
AnyDataset: TypeAlias = Dataset | Table
# what Trainer trains on: those, or a stream
TrainDataset: TypeAlias = AnyDataset | IterableDataset | TableStream
# what it evaluates: one set, or several by name
EvalDatasets: TypeAlias = AnyDataset | dict[str, AnyDataset]
Processor: TypeAlias = PreTrainedTokenizerBase | BaseImageProcessor | FeatureExtractionMixin | ProcessorMixin
# `num_items_in_batch`, as Trainer counts it
NumItems: TypeAlias = Tensor | int | None
