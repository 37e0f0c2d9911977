"""What goes in: splits, batches that know their rows, the two streams of a step, speech."""

from .batches import Batch, PairedBatches, RowSource
from .splits import check_corpus, split_forget_retain
from .streams import ForgetStream, fill_last_batch


__all__ = [
    "Batch",
    "ForgetStream",
    "PairedBatches",
    "RowSource",
    "check_corpus",
    "fill_last_batch",
    "split_forget_retain",
]
