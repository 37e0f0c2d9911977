"""The two data sets: whether they have rows, fit together, and share none."""

import hashlib
import inspect
import pickle
from collections.abc import Collection, Mapping
from datetime import date
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers.utils import logging

from ..annotations import AnyDataset, TrainDataset
from ..config import OrthoGradConfig
from ..objectives import IGNORED_LABEL


logger = logging.get_logger(__name__)

_LABELS = ("labels", "label", "label_ids")
LABEL_NAMES = frozenset(_LABELS)


def is_empty(dataset: TrainDataset | None) -> bool:
    """Whether there is no data set, or one that says it has no rows."""
    return dataset is None or (hasattr(dataset, "__len__") and len(dataset) == 0)


def needs_retain(args: OrthoGradConfig) -> bool:
    """Whether the update depends on retain samples: plain gradient ascent alone does not."""
    return args.projection != "none" or args.alpha > 0


def check_datasets(args: OrthoGradConfig, forget: AnyDataset, retain: TrainDataset | None) -> None:
    """Checks that both sets have rows, and the same columns.

    Raises:
        ValueError: The message names the set and what to do.
    """
    if not hasattr(forget, "__len__") or not hasattr(forget, "__getitem__"):
        raise ValueError(
            f"`forget_dataset` is a {type(forget).__name__}, but must have a length and rows by number: it is shuffled "
            "and cycled. Load it without streaming."
        )
    if retain is not None and not hasattr(retain, "__iter__") and not hasattr(retain, "__getitem__"):
        raise ValueError(f"`train_dataset` is a {type(retain).__name__}, which holds no rows: pass a data set.")
    if len(forget) == 0:
        raise ValueError("`forget_dataset` is empty: there is nothing to forget. Check the values it was split by.")
    if is_empty(retain):
        if needs_retain(args):
            raise ValueError(
                f"`train_dataset`, the retain set, is empty, but `projection`={args.projection!r} with "
                f"`alpha`={args.alpha} needs retain samples. Pass some, or set projection='none' and alpha=0."
            )
        return
    if not hasattr(retain, "__len__"):
        return
    _check_columns(forget, retain)
    if args.dataloader_drop_last and len(retain) < args.train_batch_size * args.world_size:
        raise ValueError(
            f"`dataloader_drop_last` is True, and `train_dataset`, the retain set, has {len(retain)} rows, fewer than one batch "
            f"of {args.train_batch_size} on each of {args.world_size} processes: no step would be made. Set it to False, or "
            "lower `per_device_train_batch_size`."
        )


def _columns(dataset) -> set[str] | None:
    if isinstance(dataset, Dataset):
        return set(dataset.column_names)
    return set(dataset[0]) if isinstance(dataset[0], Mapping) else None


def _check_columns(forget, retain) -> None:
    forget_columns, retain_columns = _columns(forget), _columns(retain)
    if forget_columns != retain_columns:
        raise ValueError(
            f"`forget_dataset` has columns {sorted(forget_columns or [])} and `train_dataset` "
            f"{sorted(retain_columns or [])}: prepare both in the same way."
        )


def check_overlap(forget: AnyDataset, retain: TrainDataset, model: nn.Module) -> None:
    """Looks for rows that stand in both sets, by what the model reads of them.

    Other columns (an id, a transcript beside its tokens), padding and the type of a sequence make no difference. Rows
    that a transform makes anew each time are compared as they are stored.

    Raises:
        ValueError: There are some; the message names the first.
    """
    if not hasattr(retain, "__len__"):
        logger.warning("`train_dataset` has no length: rows it shares with `forget_dataset` cannot be looked for.")
        return
    columns = read_columns(forget, model)
    forget_rows = {digest: row for row, digest in enumerate(row_digests(forget, columns))}
    shared = [
        (forget_rows[digest], row) for row, digest in enumerate(row_digests(retain, columns)) if digest in forget_rows
    ]
    if shared:
        raise ValueError(
            f"{len(shared)} rows stand in both `forget_dataset` and `train_dataset`, the first as row {shared[0][0]} of "
            f"the one and row {shared[0][1]} of the other: a sample cannot be forgotten and kept. Remove them from one. "
            "(If they only look alike, set `check_overlap=False`.)"
        )


def label_column(names: Collection[str]) -> str | None:
    """The column that holds labels, by the names that transformers' collators know; None without one."""
    return next((name for name in _LABELS if name in names), None)


def read_columns(dataset: AnyDataset, model: nn.Module) -> frozenset[str] | None:
    """What the model's forward pass reads besides labels; None, for all, where it reads none, as before a transform."""
    taken = set(inspect.signature(model.forward).parameters) - {*_LABELS, "attention_mask"}
    return frozenset(taken & (_columns(dataset) or set())) or None


def row_digests(dataset: AnyDataset, columns: frozenset[str] | None) -> list[bytes]:
    """What stands in each row, by a hash of these columns and the labels; of all columns without.

    Padding, the type of a sequence and other columns make no difference; rows are taken as they are stored.
    """
    if not isinstance(dataset, Dataset):
        return [row_digest(dataset[row], columns) for row in range(len(dataset))]
    # as they are stored, before any transform decodes them
    read = None if columns is None else {*columns, label_column(dataset.column_names), "attention_mask"}
    kept = [name for name in dataset.column_names if read is None or name in read]
    stored = dataset.select_columns(kept)
    return [row_digest(stored_row(stored, row), columns) for row in range(len(dataset))]


def stored_row(dataset: Dataset, row: int) -> dict:
    """A row as it is stored, before any format, decoding or transform."""
    return {name: values[0] for name, values in dataset.with_format("arrow")[row].to_pydict().items()}


def row_digest(example: object, columns: frozenset[str] | None) -> bytes:
    """That of one row, as [`row_digests`]."""
    digest = hashlib.blake2b(digest_size=16)
    if not isinstance(example, Mapping):
        _add(digest, example)
        return digest.digest()
    mask = example.get("attention_mask")
    mask = None if mask is None else np.asarray(mask).astype(bool)
    labels = label_column(example)
    # a row is the same by whichever name its labels go
    example = {"labels" if name == labels else name: value for name, value in example.items()}
    for name in sorted(example):
        value = example[name]
        if name == "attention_mask" or (columns is not None and name not in {*columns, "labels"}):
            continue
        value = _plain(value)
        array = _as_array(value) if isinstance(value, (list, tuple, np.ndarray)) else None
        if array is not None and array.dtype.kind in "iufb":
            if name == "labels":
                array = array[array != IGNORED_LABEL]
            elif mask is not None and array.shape[:1] == mask.shape:
                array = array[mask]
            value = array
        digest.update(name.encode())
        _add(digest, value)
    return digest.digest()


def _as_array(value) -> np.ndarray | None:
    """None for lists of unequal lengths."""
    try:
        return np.asarray(value)
    except ValueError:
        return None


def _plain(value):
    """A tensor as an array, which knows no bfloat16; of no dimension as a number, as rows are stored."""
    if isinstance(value, torch.Tensor):
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy(force=True)
    return value.item() if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0 else value


def _content(value):
    """Of a stored image or sound its bytes, wherever they lie; anything else as it is."""
    if not isinstance(value, Mapping) or set(value) != {"bytes", "path"}:
        return value
    if value["bytes"] is not None:
        return value["bytes"]
    path = value["path"]
    return Path(path).read_bytes() if path is not None and Path(path).is_file() else value


def _add(digest, value) -> None:
    value = _content(_plain(value))
    if isinstance(value, Mapping):
        for key in sorted(value):
            _add(digest, key)
            _add(digest, value[key])
    elif isinstance(value, np.ndarray) and value.dtype.kind in "iufb":
        # lists are read as int64 and float64, tensors may hold less
        wide = value.astype(np.int64 if value.dtype.kind in "iub" else np.float32)
        digest.update(repr(wide.shape).encode())
        digest.update(np.ascontiguousarray(wide).tobytes())
    elif isinstance(value, (list, tuple)):
        digest.update(b"[%d]" % len(value))
        for item in value:
            _add(digest, item)
    elif isinstance(value, bytes):
        digest.update(value)
    elif value is None or isinstance(value, (str, int, float, date)):
        digest.update(repr(value).encode())
    else:
        digest.update(pickle.dumps(value, protocol=4))
    digest.update(b";")
