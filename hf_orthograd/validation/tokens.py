"""Whether a language model knows the tokens of a data set, and has positions for them: looked up before anything is run."""

import re
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from torch import nn
from transformers import PreTrainedConfig

from ..annotations import TrainDataset


_ROWS = 10_000  # at a time


def check_tokens(datasets: Mapping[str, TrainDataset | None], model: nn.Module) -> None:
    """Checks that the model knows every token of data sets that hold them ready-made, and has a position for it.

    Models made of several, as of images and text, are left out: they have tokens for what is no text.

    Args:
        datasets (`Mapping`): By their arguments. Those of the library datasets are looked at, unless a transform makes rows.
        model (`torch.nn.Module`): Unwrapped, with an adapter or without.

    Raises:
        ValueError: A row has a token beyond the vocabulary, or more tokens than there are learned positions; on an accelerator
            either would end the process without a word of which row.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or config.sub_configs:
        return
    known, positions = _tokens_known(model), _positions_learned(model, config)
    columns = ["input_ids", "labels"] if config.is_encoder_decoder else ["input_ids"]
    for name, dataset in datasets.items():
        for column in columns if isinstance(dataset, Dataset) else []:
            for start, lists in parts_of(dataset, column):
                if not holds_lists(lists):
                    break
                if column == "input_ids" and known is not None:
                    _check_known(lists, start, name, known, model)
                if positions is not None:
                    _check_lengths(lists, start, (name, column), positions, model)


def _check_known(lists: pa.Array, start: int, name: str, known: int, model: nn.Module) -> None:
    span = pc.min_max(pc.list_flatten(lists)).as_py()
    if span["max"] is None or 0 <= span["min"] <= span["max"] < known:
        return
    row, token = _first(lists, lambda tokens: (tokens < 0) | (tokens >= known))
    raise ValueError(
        f"Row {start + row} of `{name}` has the token {token} in `input_ids`, but {type(model).__name__} knows 0 to {known - 1}. Use the tokenizer "
        "of this model, or enlarge it by `resize_token_embeddings`."
    )


def _check_lengths(lists: pa.Array, start: int, where: tuple[str, str], positions: int, model: nn.Module) -> None:
    lengths = pc.list_value_length(lists)
    longest = pc.max(lengths).as_py()
    if longest is None or longest <= positions:
        return
    row, (name, column) = start + pc.index(lengths, longest).as_py(), where
    raise ValueError(
        f"Row {row} of `{name}` has {longest} tokens in `{column}`, but {type(model).__name__} has {positions} positions. Cut or "
        "split the row; `prepare_text_dataset(..., max_length=...)` and the examples' `--max_length` refuse longer ones."
    )


def parts_of(dataset: Dataset, column: str) -> Iterator[tuple[int, pa.Array]]:
    """A column as it is stored, some rows at a time, each part with the number of its first row; nothing if a transform makes it."""
    if column not in dataset.column_names or dataset.format["type"] == "custom":
        return
    rows = dataset.select_columns([column]).with_format("arrow")
    for start in range(0, len(rows), _ROWS):
        yield start, rows[start : start + _ROWS][column].combine_chunks()


def holds_lists(part: pa.Array) -> bool:
    """Whether each row is a list of whole numbers."""
    is_list = pa.types.is_list(part.type) or pa.types.is_large_list(part.type)
    return is_list and pa.types.is_integer(part.type.value_type)


def _first(lists: pa.Array, is_wrong) -> tuple[int, int]:
    """The first row with such a token, and the token."""
    for row, tokens in enumerate(lists):
        found = np.array(tokens.as_py() or [], dtype=np.int64)
        if (wrong := is_wrong(found)).any():
            return row, int(found[wrong][0])
    raise LookupError("No row has such a token.")


def _tokens_known(model: nn.Module) -> int | None:
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a model of another kind: its own loss says what it reads
        return None
    return getattr(getattr(table, "base_layer", table), "num_embeddings", None)


def _positions_learned(model: nn.Module, config: PreTrainedConfig) -> int | None:
    """How many a table of positions holds that are added to what is read; None where positions are turned or told apart otherwise."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    tables = [  # RoBERTa counts from behind the padding token's number; a table may have two rows that no token gets
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and re.search(r"(^|\.)(wpe|\w*position\w*)(\.(base_layer|original_module))?$", name)
    ]
    return min((min(limit, rows) for rows in tables if limit - 4 <= rows <= limit + 2), default=None)
