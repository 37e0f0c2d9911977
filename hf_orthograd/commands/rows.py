"""Rows that a command is given by a path."""

from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError


def load_rows(path: str, *, leave_no_copy: bool = False) -> Dataset:
    """A data set of a folder of `save_to_disk`, or a parquet or JSON file.

    Args:
        leave_no_copy (`bool`): Whether to hold it in memory, so that no copy of its rows stays in a cache.

    Raises:
        ValueError: There is no such file or folder, or it holds something else.
    """
    if not Path(path).exists():
        raise ValueError(f"There is nothing at {path!r}. Pass a parquet or JSON file, or a folder of `save_to_disk`.")
    try:
        return _load(path, leave_no_copy)
    except (FileNotFoundError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"{path!r} gives no rows ({error}). Pass a parquet or JSON file with rows, or a folder of `save_to_disk`."
        ) from error


def _load(path: str, leave_no_copy: bool) -> Dataset:
    if path.endswith((".parquet", ".json", ".jsonl")):
        source = {"path": "parquet" if path.endswith(".parquet") else "json", "data_files": path, "split": "train"}
        if not leave_no_copy:
            return load_dataset(**source)
        with TemporaryDirectory() as folder:
            return load_dataset(**source, cache_dir=folder, keep_in_memory=True)
    rows = load_from_disk(path)
    if not isinstance(rows, Dataset):
        raise ValueError(f"it holds several sets, {', '.join(rows)}")
    return rows
