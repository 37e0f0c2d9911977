"""Measures named sets of data under a trainer: batched, on all its processes, and under other models than its own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_to_fp32
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import EvalPrediction, Trainer
from transformers.utils import logging

from ..annotations import AnyDataset
from ..data import ChangingCollator
from ..objectives import PerSampleLoss
from ..objectives.families import without_unpredicted
from ..parallel.sharding import is_sharded
from ..trials import preserved_modes, preserved_random_state, replaced
from ..validation import check_per_sample
from .metrics import SampleMetric


logger = logging.get_logger(__name__)

# every row, in its place; and a model that is cast for an evaluation stays cast
_AS_IT_IS = {
    "train_sampling_strategy": "random",  # by length, rows would come in another order
    "dataloader_drop_last": False,
    "dataloader_persistent_workers": False,  # a loader that is kept is of another set, and its workers stay
    "bf16_full_eval": False,
    "fp16_full_eval": False,
}


@dataclass
class Measurement:
    """One set under one model: losses of shape (n,), in nats, and each metric's counts, (n,) each, by its name."""

    losses: np.ndarray
    counts: dict[str, tuple[np.ndarray, np.ndarray]]


def measure(trainer: Trainer, dataset: AnyDataset, metrics: Sequence[SampleMetric] = ()) -> Measurement:
    """Measures a set under the trainer's model, in evaluation mode, in the order of its rows.

    Predictions are the trainer's own: with `predict_with_generate` they are generated. Labels that padding would predict are left out.

    Raises:
        ValueError: The trainer makes no predictions, from which metrics could be taken.
    """
    if metrics and trainer.args.prediction_loss_only:
        raise ValueError("`prediction_loss_only` is True, but the report's metrics need predictions. Set it to False.")
    with preserved_random_state(), preserved_modes(trainer.model), _every_row(trainer):
        losses = per_sample_losses(trainer, dataset)
        if not metrics:
            return Measurement(losses, {})
        with ExitStack() as stack:
            stack.enter_context(replaced(trainer, "compute_metrics", None))  # the counts are computed below
            if PerSampleLoss(trainer.accelerator.unwrap_model(trainer.model), loss_function(trainer)).shifts_labels:
                collator = ChangingCollator(trainer.data_collator, without_unpredicted)
                stack.enter_context(replaced(trainer, "data_collator", collator))
            output = trainer.predict(dataset)
    # Seq2SeqTrainer keeps the rows with which the last batch of several processes is filled up
    predictions, labels = (_first_rows(array, len(losses)) for array in (output.predictions, output.label_ids))
    prediction = EvalPrediction(predictions, labels)
    return Measurement(losses, {metric.name: metric.counts(prediction) for metric in metrics})


@contextmanager
def _every_row(trainer: Trainer) -> Iterator[None]:
    """Has the trainer's loaders give all rows in order, and leave the model's precision as it is."""
    with ExitStack() as stack:
        for name, value in _AS_IT_IS.items():
            stack.enter_context(replaced(trainer.args, name, value))
        yield


def _first_rows(arrays: np.ndarray | tuple, count: int) -> np.ndarray | tuple:
    return tuple(array[:count] for array in arrays) if isinstance(arrays, tuple) else arrays[:count]


def per_sample_losses(trainer: Trainer, dataset: AnyDataset) -> np.ndarray:
    """The loss of each sample, shape (n,), in nats, in the order of the rows, the same on every process.

    Raises:
        ValueError: The loss of this model is not known per sample, or the collator joins rows; the message says what to pass.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    per_sample_loss = PerSampleLoss(model, loss_function(trainer))
    forward = trainer.model_wrapped if is_sharded(model) else model
    with _every_row(trainer):
        loader = trainer.get_eval_dataloader(dataset)
    model.to(trainer.args.device)
    model.eval()
    found = []
    quiet = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
    for batch in tqdm(loader, desc="Per-sample losses", disable=quiet, leave=False):
        with torch.no_grad(), trainers_precision(trainer, model):
            losses = per_sample_loss(forward, batch)
        check_per_sample(losses, len(batch["labels"]) if "labels" in batch else len(losses))
        found.append(trainer.accelerator.gather_for_metrics(losses.float()).cpu())
    losses = torch.cat(found).numpy().astype(float)
    if hasattr(dataset, "__len__") and len(losses) != len(dataset):
        raise ValueError(
            f"{len(dataset)} rows have {len(losses)} losses: the trainer's `data_collator` makes one row of several, padding-free. Use one that "
            "pads."
        )
    if not np.isfinite(losses).all():
        logger.warning(
            f"{np.sum(~np.isfinite(losses))} of {len(losses)} losses are not finite, the first of row {np.argmin(np.isfinite(losses))}. They "
            "count as the largest. A CTC loss is infinite where an utterance is shorter than its transcript."
        )
    return losses


@contextmanager
def trainers_precision(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """Runs a model that no trainer has prepared under the trainer's mixed precision, as accelerate runs one that it prepares.

    Otherwise a reference would answer in float32 beside an unlearned model that answers in bf16.
    """
    accelerator = trainer.accelerator
    if not accelerator.native_amp or hasattr(model, "_original_forward"):
        yield
        return
    own = model.forward

    @wraps(own)  # `generate()` and Trainer read its signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            outputs = own(*args, **kwargs)
        return convert_to_fp32(outputs)

    before = vars(model).get("forward")
    model.forward, model._original_forward = forward, own  # the second as accelerate marks what it has prepared
    try:
        yield
    finally:
        vars(model).pop("_original_forward", None)
        vars(model).pop("forward", None)  # by now accelerate may have put one over it
        if before is not None:
            model.forward = before


def loss_function(trainer: Trainer) -> Callable | None:
    """The loss that the user passed to the trainer, if any."""
    unlearns = getattr(trainer, "forget_dataset", None) is not None  # then it keeps the loss from Trainer
    return trainer.per_sample_loss_func if unlearns else trainer.compute_loss_func


@contextmanager
def examining(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """Has the trainer evaluate `model` in place of its own.

    Raises:
        ValueError: The trainer's model is sharded, and another cannot take its place.
    """
    if model is trainer.model:
        yield
        return
    if is_sharded(trainer.accelerator.unwrap_model(trainer.model)) or trainer.is_deepspeed_enabled:
        raise ValueError(
            "Under FSDP or DeepSpeed only the trainer's own model can be evaluated: load the saved model in a trainer "
            "of one process, or DDP, to compare it with a reference or to attack it."
        )
    own, device = (trainer.model, trainer.model_wrapped), next(model.parameters()).device
    trainer.model = trainer.model_wrapped = model.to(trainer.args.device)
    try:
        with trainers_precision(trainer, model), _trainers_generation(trainer, model, own[0]):
            yield
    finally:
        trainer.model, trainer.model_wrapped = own
        model.to(device)  # two models and a copy under attack need not be on the device at once


@contextmanager
def _trainers_generation(trainer: Trainer, model: nn.Module, own: nn.Module) -> Iterator[None]:
    """Has a model generate as the trainer's own, if the arguments have a `generation_config`, which that alone was given."""
    if getattr(trainer.args, "generation_config", None) is None or not hasattr(model, "generation_config"):
        yield
        return
    with replaced(model, "generation_config", own.generation_config):
        yield


def column_values(dataset: AnyDataset, column: str) -> Sequence:
    """The values of one column, of a `datasets.Dataset` or of any data set whose rows are dicts.

    Raises:
        ValueError: There is no such column.
    """
    names = dataset.column_names if isinstance(dataset, Dataset) else list(dataset[0])
    if column not in names:
        raise ValueError(f"`group_column` is {column!r}, but the rows have {', '.join(names)}.")
    if isinstance(dataset, Dataset):
        return dataset.with_format(None)[column]
    values = (row[column] for row in dataset)
    return [value.item() if isinstance(value, torch.Tensor) else value for value in values]
