"""Splits of a data set into what is forgotten and what is kept."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict


def split_forget_retain(
    dataset: Dataset,
    column: str,
    values: Any,
    *,
    retain_size: int | float | None = None,
    seed: int = 0,
    stratify_by: str | None = None,
) -> DatasetDict:
    """Splits off the rows to forget, and optionally keeps only part of the rest.

    Args:
        dataset (`datasets.Dataset`): The training data.
        column (`str`): Column that says whose or what a row is.
        values: The value, or a list of the values, whose rows are forgotten; of a `ClassLabel` column numbers or names, and of
            whole numbers also their digits, as a command line gives them.
        retain_size (`int` or `float`, *optional*): Rows of the rest that are still at hand: a number, or a fraction
            below 1. All by default.
        seed (`int`, *optional*, defaults to 0): Of the draw of those rows.
        stratify_by (`str`, *optional*): Column whose values the retain rows represent in proportion, each at least once
            if there are enough rows.

    Returns:
        `datasets.DatasetDict` with splits "forget" and "retain", rows in their original order.

    Raises:
        ValueError: An unknown column, a value no row has (the message lists those present), or a size out of range.
    """
    for argument, name in (("column", column), ("stratify_by", stratify_by)):
        if name is not None and name not in dataset.column_names:
            raise ValueError(
                f"`{argument}` is {name!r}, but the data set has columns {', '.join(dataset.column_names)}."
            )
    values, stored = _as_stored(dataset, column, values)
    present = dataset.unique(column)
    missing = [value for value, own in zip(values, stored, strict=True) if own not in present]
    if missing or not values:
        raise ValueError(
            f"`values` {missing or values} do not occur in column {column!r}, which has {_listed(dataset, column, present, missing)}."
        )
    forgotten = np.array([value in stored for value in dataset.with_format(None)[column]])
    rest = np.flatnonzero(~forgotten)
    count = retain_count(retain_size, len(rest))
    if count < len(rest):
        groups = None if stratify_by is None else np.array(dataset.select(rest)[stratify_by], dtype=object).astype(str)
        rest = rest[np.sort(_draw(len(rest), count, groups, np.random.default_rng(seed)))]
    return DatasetDict(forget=dataset.select(np.flatnonzero(forgotten)), retain=dataset.select(rest))


def present_values(dataset: Dataset, column: str, values: Any) -> list:
    """Those of some values that a row has: a test set may lack some of the forgotten.

    Args:
        dataset (`datasets.Dataset`): The rows.
        column (`str`): Column that says whose or what a row is.
        values: A value, or a list; of a `ClassLabel` column numbers or names.

    Returns:
        `list`: In the order and the form in which they were given.

    Raises:
        ValueError: An unknown column.
    """
    present = dataset.unique(column)
    return [value for value, own in zip(*_as_stored(dataset, column, values), strict=True) if own in present]


def _as_stored(dataset: Dataset, column: str, values: Any) -> tuple[list, list]:
    """Values as a list, and as rows hold them: of a `ClassLabel` column numbers, of a column of whole numbers those."""
    values = values.tolist() if isinstance(values, np.ndarray) else values
    values = list(values) if isinstance(values, (list, tuple, set)) else [values]
    feature = dataset.features[column]
    names, dtype = getattr(feature, "names", None), str(getattr(feature, "dtype", ""))
    if names:
        return values, [names.index(value) if value in names else value for value in values]
    if not dtype.startswith(("int", "uint")):
        return values, values
    return values, [
        int(value) if isinstance(value, str) and value.removeprefix("-").isdecimal() else value for value in values
    ]


def _listed(dataset: Dataset, column: str, present: list, missing: list) -> str:
    """What a column holds, those first that look like what was asked for, and 50 at most."""
    names = getattr(dataset.features[column], "names", None)
    shown = [names[value] if names and value is not None and value >= 0 else value for value in present]
    words = list(map(str, shown[:10_000]))  # a comparison with each takes its time
    near = {match for value in missing[:3] for match in difflib.get_close_matches(str(value), words)}
    shown = sorted(shown, key=lambda value: (str(value) not in near, str(value)))
    more = f" and {len(shown) - 50} more" if len(shown) > 50 else ""
    return ", ".join(map(repr, shown[:50])) + more


def check_corpus(
    corpus: Mapping,
    columns: Mapping[str, str],
    splits: Sequence[str] = ("train", "test"),
    *,
    flag: str = "--dataset_name",
) -> None:
    """Checks that a corpus has the splits and columns that a script was told of.

    Args:
        corpus (`datasets.DatasetDict`): As `load_dataset` returns it.
        columns (`Mapping[str, str]`): For each flag of the script, the column that it names.
        splits (`Sequence[str]`): Which are needed.
        flag (`str`): That names the corpus.

    Raises:
        ValueError: One is missing; the message names the flag and lists what there is.
    """
    if not isinstance(corpus, Mapping):
        raise ValueError(f"`{flag}` is one {type(corpus).__name__}, but must have the splits {', '.join(splits)}.")
    missing = [name for name in splits if name not in corpus]
    if missing:
        raise ValueError(
            f"`{flag}` has no split {' and '.join(missing)}, only {', '.join(corpus)}. What was never trained on is "
            "measured beside the rest: split some rows off with `train_test_split`, and save both."
        )
    for name, column in columns.items():
        for split in splits:
            if column not in corpus[split].column_names:
                raise ValueError(
                    f"`{name}` is {column!r}, but the split {split!r} of `{flag}` has the columns {', '.join(corpus[split].column_names)}."
                )


def retain_count(retain_size: int | float | None, available: int) -> int:
    """How many rows that is, of those that are not forgotten.

    Args:
        retain_size (`int` or `float`, *optional*): A number, or a fraction below 1; all by default.
        available (`int`): How many rows are not forgotten.

    Raises:
        ValueError: That is none, more than there are, or no whole number.
    """
    if retain_size is None:
        return available
    count = round(retain_size * available) if isinstance(retain_size, float) and retain_size < 1 else retain_size
    if not 1 <= count <= available or count != int(count):
        raise ValueError(
            f"`retain_size` is {retain_size}, but {available} rows are not forgotten: at least 1 and at most those."
        )
    return int(count)


def _draw(available: int, count: int, groups: np.ndarray | None, generator: np.random.Generator) -> np.ndarray:
    order = generator.permutation(available)
    if groups is None:
        return order[:count]
    # the j-th drawn row of a group of n stands at (j + 1/2) / n: cutting that order at any point leaves each group with
    # its share, and the first row of every group comes before the second of any when rows are scarce
    _, group_of = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group_of)
    rank = np.empty(available)
    for group, size in enumerate(sizes):
        members = order[group_of[order] == group]
        rank[members] = (np.arange(size) + 0.5) / size
        if count >= len(sizes):
            rank[members[0]] = -1
    return np.lexsort((np.argsort(order), rank))[:count]
