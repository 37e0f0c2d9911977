"""What goes in: splits, batches that know their rows, the two streams of a step, speech, text, variation."""

from .batches import Batch, ChangingCollator, PairedBatches, RowSource
from .splits import check_corpus, present_values, retain_count, split_forget_retain
from .streams import ForgetStream, fill_last_batch, load_batches
from .text import prepare_text_dataset
from .variation import VaryImages, VarySpeech


__all__ = [
    "Batch",
    "ChangingCollator",
    "ForgetStream",
    "PairedBatches",
    "RowSource",
    "VaryImages",
    "VarySpeech",
    "check_corpus",
    "fill_last_batch",
    "load_batches",
    "prepare_text_dataset",
    "present_values",
    "retain_count",
    "split_forget_retain",
]
