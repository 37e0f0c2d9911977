"""Everything that can be wrong with a run, said before its first step: the argument, what was given, what to do."""

from .datasets import (
    LABEL_NAMES,
    check_datasets,
    check_overlap,
    is_empty,
    label_column,
    needs_retain,
    read_columns,
    row_digest,
    row_digests,
    stored_row,
)
from .launch import (
    check_arguments,
    check_batch_norm,
    check_launch,
    check_steps,
    find_parameters,
    freeze_batch_norm,
    warn_of_half_precision,
)
from .losses import check_labels_stay, check_per_sample, check_samples
from .samples import check_objectives, check_precomputed, check_prompts
from .tokens import check_tokens


__all__ = [
    "LABEL_NAMES",
    "check_arguments",
    "check_batch_norm",
    "check_datasets",
    "check_labels_stay",
    "check_launch",
    "check_objectives",
    "check_overlap",
    "check_per_sample",
    "check_precomputed",
    "check_prompts",
    "check_samples",
    "check_steps",
    "check_tokens",
    "find_parameters",
    "freeze_batch_norm",
    "is_empty",
    "label_column",
    "needs_retain",
    "read_columns",
    "row_digest",
    "row_digests",
    "stored_row",
    "warn_of_half_precision",
]
