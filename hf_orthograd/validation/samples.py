"""Labels of both sets, of a few samples and where they stand ready-made, and whether what is asked for fits them."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.utils import logging

from ..annotations import AnyDataset, TrainDataset
from ..config import OrthoGradConfig
from ..data import Batch
from ..objectives import IGNORED_LABEL, PerSampleLoss
from .tokens import holds_lists, parts_of


logger = logging.get_logger(__name__)


def check_objectives(
    args: OrthoGradConfig,
    per_sample_loss: PerSampleLoss,
    ref_model: nn.Module | None,
    model: nn.Module,
    train_dataset: object,
) -> None:
    """Checks that what `retain_loss` and `forget_loss` ask for is known, and that [`check_precomputed`] holds.

    Raises:
        ValueError: "refusal" of what has no such answer; "kl" with a loss of the user's own, whose divergence is not known; or a
            `ref_model` that nothing is held to, or that is trained itself.
    """
    if args.forget_loss == "refusal":
        per_sample_loss.answering(args.refusal_labels)
        _warn_of_an_open_end(args.refusal_labels, per_sample_loss)
    if ref_model is not None and not args.keeps_predictions:
        raise ValueError(
            f"`ref_model` is given, but `retain_loss` is {args.retain_loss!r} with `alpha` {args.alpha}: nothing is held to it. Set "
            "retain_loss='kl' and `alpha` above 0, or leave it out."
        )
    if ref_model is model:
        raise ValueError(
            "`ref_model` is the model that is trained: leave it out to hold to its start, or load it anew."
        )
    if args.keeps_predictions and not per_sample_loss.has_divergence:
        raise ValueError(
            "`retain_loss` is 'kl', and with a `compute_loss_func` of your own it is not known what diverges. Pass "
            "`compute_divergence_func(outputs, start_outputs, labels)` that returns shape (batch size,), or set "
            "retain_loss='nll'."
        )
    check_precomputed(args, per_sample_loss, train_dataset)


def _warn_of_an_open_end(answer: list[int], per_sample_loss: PerSampleLoss) -> None:
    """Says so if an answer lacks the token that ends it: the model would learn to go on."""
    model = per_sample_loss.model
    if not (per_sample_loss.shifts_labels or model.config.is_encoder_decoder):
        return
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else ends
    if ends and not set(ends).intersection(answer):
        logger.warning(
            f"`refusal_labels` is {answer}, without the token that ends an answer ({', '.join(map(str, ends))}): the model learns to say more. "
            "Append it."
        )


def check_precomputed(args: OrthoGradConfig, per_sample_loss: PerSampleLoss, train_dataset: object) -> None:
    """Checks that the starting model's predictions can be found once for all steps, where `precompute_ref_logits` asks for it.

    Raises:
        ValueError: They are not used, they are not logits at labels, or samples have no row numbers.
    """
    if not args.precompute_ref_logits:
        return
    if not args.keeps_predictions:
        raise ValueError(
            f"`precompute_ref_logits` is True, but `retain_loss` is {args.retain_loss!r} with `alpha` {args.alpha}, which uses no "
            "predictions of the starting model. Leave it out, or set retain_loss='kl' and `alpha` above 0."
        )
    if not per_sample_loss.has_counted_logits:
        raise ValueError(
            f"`precompute_ref_logits` is True, which is for classifiers of samples and of tokens, but the model is a "
            f"{type(per_sample_loss.model).__name__}, or `compute_loss_func` or `compute_divergence_func` is given. Leave it out."
        )
    if not hasattr(train_dataset, "__len__"):
        raise ValueError(
            "`precompute_ref_logits` is True, but `train_dataset` is a stream, whose samples have no numbers to find predictions by. "
            "Leave it out, or pass a data set with a length."
        )


def check_batch(batch: Batch, name: str, per_sample_loss: PerSampleLoss) -> None:
    """Checks the labels of a batch with row numbers.

    Args:
        batch ([`Batch`]): What the collator made of the first rows.
        name (`str`): The data set's, in messages.
        per_sample_loss ([`PerSampleLoss`]): What the run will use.

    Raises:
        ValueError: It has no labels, labels of the wrong type or out of range, or a row in which none counts.
    """
    missing = [column for column in per_sample_loss.label_names if batch.inputs.get(column) is None]
    if missing:
        raise ValueError(
            f"The batches made from `{name}` have no {' and '.join(map(repr, missing))}: check `data_collator`, and that the data "
            "set has that column and `remove_unused_columns` does not drop it."
        )
    labels = batch.inputs.get("labels")
    if isinstance(labels, Tensor):
        check_labels(labels, name, per_sample_loss, batch.rows.tolist())


def check_labels(labels: Tensor, name: str, per_sample_loss: PerSampleLoss, rows: list[int]) -> None:
    """Checks labels of shape (B,) or (B, T), of the rows numbered `rows`.

    Raises:
        ValueError: The message names the rows.
    """
    if "labels" not in per_sample_loss.label_names:
        return
    problem = per_sample_loss.problem(labels)
    if problem in ("regression", "multi_label_classification"):
        return _check_numbers(labels, name, problem, per_sample_loss.num_classes, rows)
    if labels.is_floating_point():
        raise ValueError(
            f"The labels of `{name}` are {str(labels.dtype).removeprefix('torch.')}, but this loss takes classes as whole "
            "numbers."
        )
    if problem is not None and labels.ndim != 1:
        raise ValueError(
            f"The labels of `{name}` have shape {tuple(labels.shape)} for {len(rows)} rows, but a classifier takes one class "
            "for each. For several labels a sample give them as floating numbers, and set the model's `config.problem_type` to "
            "'multi_label_classification'."
        )
    classes = per_sample_loss.num_classes
    ignored = (
        torch.zeros_like(labels, dtype=torch.bool) if problem is not None else labels == per_sample_loss.ignored_label
    )
    if classes is not None:
        wrong = ~ignored & ((labels < 0) | (labels >= classes))
        if wrong.any():
            first = int(wrong.reshape(len(labels), -1).any(dim=1).nonzero()[0])
            value = int(labels[first][wrong[first]].flatten()[0])
            raise ValueError(
                f"Row {rows[first]} of `{name}` has the label {value}, but this model knows 0 to {classes - 1}. Map the "
                "labels, or make the model with as many (`num_labels`, or a larger vocabulary)."
            )
    counted = labels.masked_fill(ignored, IGNORED_LABEL)
    empty = find_unlabelled_rows(counted, per_sample_loss.shifts_labels)
    if empty:
        listed = ", ".join(str(rows[row]) for row in empty)
        raise ValueError(
            f"All labels are {per_sample_loss.ignored_label} in rows {listed} of `{name}`: nothing is predicted there. Remove them."
        )


def _check_numbers(labels: Tensor, name: str, problem: str, count: int, rows: list[int]) -> None:
    """Those of a regression, or zeros and ones for several labels."""
    wanted = (len(rows),) if count == 1 else (len(rows), count)
    if labels.shape != wanted and labels.shape != (len(rows), count):
        raise ValueError(
            f"The labels of `{name}` have shape {tuple(labels.shape)} for {len(rows)} rows, but this model has {count} outputs "
            f"(`num_labels`), and under problem_type={problem!r}, which floating labels mean too, takes {count} numbers a row. For "
            "one class a row give whole numbers."
        )
    wrong = ~labels.isfinite() if problem == "regression" else ~((labels >= 0) & (labels <= 1))
    if wrong.any():
        first = int(wrong.reshape(len(labels), -1).any(dim=1).nonzero()[0])
        value = labels[first][wrong[first]].flatten()[0].item()
        domain = "finite numbers" if problem == "regression" else "numbers from 0 to 1"
        raise ValueError(
            f"Row {rows[first]} of `{name}` has the label {value}, but problem_type={problem!r} takes {domain}."
        )


def find_unlabelled_rows(labels: Tensor, shifted: bool) -> list[int]:
    """Rows of a batch without a single label that counts.

    Args:
        labels (`torch.Tensor`): Shape (B,), (B, T) or (B, H, W).
        shifted (`bool`): Whether the first position is never predicted, as in causal language models.
    """
    if labels.ndim < 2:
        return []
    counted = labels[:, 1:] if shifted else labels
    return (~(counted >= 0).flatten(1).any(dim=1)).nonzero().flatten().tolist()


def check_label_column(dataset: TrainDataset, name: str, per_sample_loss: PerSampleLoss) -> None:
    """The same for every row of a data set that holds its labels ready-made."""
    if not isinstance(dataset, Dataset):
        return
    for start, part in parts_of(dataset, "labels"):
        if _all_count(part, per_sample_loss):
            continue
        for row, labels in enumerate(part.to_pylist(), start):
            if labels is None:
                raise ValueError(f"Row {row} of `{name}` has no label (None). Remove it, or label it.")
            if isinstance(labels, (list, int, float)) and labels != []:
                check_labels(torch.as_tensor(labels)[None], name, per_sample_loss, [row])


def _all_count(part: pa.Array, per_sample_loss: PerSampleLoss) -> bool:
    """Whether all labels of a part of a column are classes of the model, and each row has one, seen at a glance; if not, look again."""
    count, is_list = per_sample_loss.num_classes, holds_lists(part)
    if part.null_count or count is None or not (is_list or pa.types.is_integer(part.type)):
        return False
    if is_list != (per_sample_loss.problem(torch.zeros(1, dtype=torch.long)) is None) or not len(part):
        return False
    flat = (pc.list_flatten(part) if is_list else part).to_numpy(zero_copy_only=False)
    counted = flat != per_sample_loss.ignored_label if is_list else np.ones(len(flat), dtype=bool)
    if flat.dtype.kind != "i" or ((flat < 0) | (flat >= count))[counted].any():
        return False
    if not is_list:
        return True
    lengths = pc.list_value_length(part).to_numpy()
    firsts = np.cumsum(lengths) - lengths
    if not lengths.all():
        return False
    if per_sample_loss.shifts_labels:
        counted[firsts] = False
    return bool((np.add.reduceat(counted.astype(np.int64), firsts) > 0).all())


def check_prompts(dataset: AnyDataset, per_sample_loss: PerSampleLoss) -> None:
    """Checks that each row of a causal language model's forget set, if it holds its labels ready-made, has a prompt to refuse.

    Raises:
        ValueError: The message names the row.
    """
    has_labels = isinstance(dataset, Dataset) and "labels" in dataset.column_names
    if not has_labels or dataset.format["type"] == "custom" or not per_sample_loss.shifts_labels:
        return
    for row, labels in enumerate(dataset.with_format(None)["labels"]):
        if labels[:1] != [IGNORED_LABEL]:
            raise ValueError(
                f"forget_loss='refusal' answers a prompt, but row {row} of `forget_dataset` has none: its labels begin with "
                f"{labels[:1]}, and not -100. Mask prompts, or use another `forget_loss` for plain text."
            )
