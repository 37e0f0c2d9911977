"""Everything that can be wrong with a run, said before its first step: the argument, what was given, what to do."""

import hashlib
import pickle
from collections.abc import Mapping

import numpy as np
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.utils import logging

from .config import OrthoGradConfig
from .gradients import Parameters
from .objectives import PerSampleLoss, check_per_sample, find_unlabelled_rows


logger = logging.get_logger(__name__)

# below so many retain samples a step the projection gained little in the ablations (docs/choosing_settings.md)
FEW_RETAIN_SAMPLES = 16


def check_launch(args: OrthoGradConfig, state: AcceleratorState) -> None:
    """Refuses launches under which the update would not be the one the configuration names.

    Args:
        args ([`OrthoGradConfig`]): The configuration.
        state (`accelerate.state.AcceleratorState`): Knows what the launcher has set, too.
    """
    fsdp, deepspeed = getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None)
    zero_stage = None if deepspeed is None else deepspeed.zero_stage
    refusals = {
        "`fsdp` of version 1 (set fsdp_config={'version': 2})": fsdp is not None and fsdp.fsdp_version != 2,
        "`fsdp` with `retain_chunk_size` (leave one out)": fsdp is not None and args.retain_chunk_size is not None,
        "`deepspeed` with ZeRO stage 3 (use stage 2, or `fsdp`)": zero_stage == 3,
        "`deepspeed` with `fp16` (use `bf16`)": deepspeed is not None and args.fp16,
        "`deepspeed` with projection_target='update' (DeepSpeed's step cannot be corrected: use `fsdp`)": (
            deepspeed is not None and args.projection_target == "update"
        ),
        "torch.nn.DataParallel (set CUDA_VISIBLE_DEVICES to one device)": args.n_gpu > 1,
        "`label_smoothing_factor`": args.label_smoothing_factor != 0,
    }
    for what, refused in refusals.items():
        if refused:
            raise ValueError(f"Unlearning with a `forget_dataset` does not support {what}.")


def needs_retain(args: OrthoGradConfig) -> bool:
    """Whether the update depends on retain samples: plain gradient ascent alone does not."""
    return args.projection != "none" or args.alpha > 0


def check_datasets(args: OrthoGradConfig, forget, retain) -> None:
    """Checks that both sets have rows, the same columns, and no row in common."""
    if not hasattr(forget, "__len__") or not hasattr(forget, "__getitem__"):
        raise ValueError(
            f"`forget_dataset` is a {type(forget).__name__}, but must have a length and rows by number: it is shuffled "
            "and cycled. Load it without streaming."
        )
    if len(forget) == 0:
        raise ValueError("`forget_dataset` is empty: there is nothing to forget. Check the values it was split by.")
    has_retain = retain is not None and (not hasattr(retain, "__len__") or len(retain) > 0)
    if not has_retain:
        if needs_retain(args):
            raise ValueError(
                f"`train_dataset`, the retain set, is empty, but `projection`={args.projection!r} with "
                f"`alpha`={args.alpha} needs retain samples. Pass some, or set projection='none' and alpha=0."
            )
        return
    if not hasattr(retain, "__len__"):
        logger.warning("`train_dataset` has no length: rows it shares with `forget_dataset` cannot be looked for.")
        return
    _check_columns(forget, retain)
    _check_overlap(forget, retain)


def warn_of_few_retain_samples(args: OrthoGradConfig, batch_size: int, retain) -> None:
    """Says so if a step protects few retain samples, though there are more to take."""
    number = batch_size * args.gradient_accumulation_steps * args.world_size
    few = min(FEW_RETAIN_SAMPLES, len(retain)) if hasattr(retain, "__len__") else FEW_RETAIN_SAMPLES
    if args.projection == "orthogonal" and number < few:
        logger.warning(
            f"Each step protects the gradients of only {number} retain samples. With fewer than {FEW_RETAIN_SAMPLES} the "
            "projection gained little in the library's studies. Raise `per_device_train_batch_size`, or "
            "`gradient_accumulation_steps`, which gives the same projection in less memory."
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


def _check_overlap(forget, retain) -> None:
    forget_rows = {digest: row for row, digest in enumerate(_digests(forget))}
    shared = [(forget_rows[digest], row) for row, digest in enumerate(_digests(retain)) if digest in forget_rows]
    if shared:
        raise ValueError(
            f"{len(shared)} rows stand in both `forget_dataset` and `train_dataset`, the first as row {shared[0][0]} of "
            f"the one and row {shared[0][1]} of the other: a sample cannot be forgotten and kept. Remove them from one."
        )


def _digests(dataset) -> list[bytes]:
    """A digest of each row's content; arrow rows as they are stored, before any transform decodes them."""
    if isinstance(dataset, Dataset):
        dataset = dataset.with_format("arrow")
        return [_digest(dataset[row].to_pydict()) for row in range(len(dataset))]
    return [_digest(dataset[row]) for row in range(len(dataset))]


def _digest(example) -> bytes:
    digest = hashlib.blake2b(digest_size=16)

    def add(value) -> None:
        if isinstance(value, Mapping):
            for key in sorted(value):
                add(key)
                add(value[key])
        elif isinstance(value, (list, tuple)):
            digest.update(b"[%d]" % len(value))
            for item in value:
                add(item)
        elif isinstance(value, (np.ndarray, torch.Tensor)):
            digest.update(repr((tuple(value.shape), str(value.dtype))).encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, bytes):
            digest.update(value)
        else:
            digest.update(repr(value).encode() if isinstance(value, (str, int, float)) else pickle.dumps(value))
        digest.update(b";")

    add(example)
    return digest.digest()


def find_parameters(model: nn.Module, args: OrthoGradConfig) -> Parameters:
    """Splits the trainable parameters into those under the projection and the others.

    Raises:
        ValueError: None is trainable, or none belongs to LoRA where only LoRA is to be projected.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no trainable parameter: every `requires_grad` is False. An adapter "
            "loaded for inference needs `is_trainable=True`."
        )
    if args.projection_parameters == "trainable":
        return Parameters(projected=trainable, others={})
    lora = {name: parameter for name, parameter in trainable.items() if "lora_" in name}
    if not lora:
        raise ValueError(
            "`projection_parameters` is 'lora', but `model` has no trainable LoRA parameter. Wrap it with "
            "`peft.get_peft_model`, or set projection_parameters='trainable'."
        )
    return Parameters(projected=lora, others={name: p for name, p in trainable.items() if name not in lora})


def check_batch_norm(model: nn.Module) -> None:
    """Raises if a BatchNorm layer of a model in training mode couples the samples of a batch."""
    coupled = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]
    if coupled:
        raise ValueError(
            f"BatchNorm in training mode couples the samples of a batch ({coupled[0]} and {len(coupled) - 1} more), so "
            "that per-sample gradients do not exist. Set `freeze_batch_norm=True` to keep its running statistics fixed."
        )


def check_labels(labels, *, what: str, shifted: bool, sample_indices: list[int]) -> None:
    """Raises if a batch has no labels, or a row in which none counts."""
    if labels is None:
        raise ValueError(
            f"The batches made from `{what}` have no 'labels': check `data_collator`, and that the data set has that "
            "column and `remove_unused_columns` does not drop it."
        )
    rows = find_unlabelled_rows(labels, shifted)
    if rows:
        listed = ", ".join(str(sample_indices[row]) for row in rows)
        raise ValueError(f"All labels are -100 in rows {listed} of `{what}`: nothing is predicted there. Remove them.")


def check_label_column(dataset, what: str, shifted: bool) -> None:
    """The same for every row of a data set that holds its labels ready-made."""
    if not isinstance(dataset, Dataset) or "labels" not in dataset.column_names or dataset.format["type"] == "custom":
        return
    for row, labels in enumerate(dataset.with_format(None)["labels"]):
        if isinstance(labels, list) and labels:
            check_labels(torch.as_tensor(labels)[None], what=what, shifted=shifted, sample_indices=[row])


def check_losses(per_sample_loss: PerSampleLoss, model: nn.Module, batch: Mapping, sample: Mapping) -> None:
    """Checks that the loss is per sample, and that for a single sample it is the loss the model itself computes.

    Args:
        per_sample_loss ([`PerSampleLoss`]): What the run will use.
        model (`torch.nn.Module`): The model.
        batch, sample (`Mapping`): Inputs of a few samples and of one.
    """
    with torch.no_grad():
        check_per_sample(per_sample_loss(model, batch), len(batch["labels"]))
        losses, outputs = per_sample_loss.with_outputs(model, sample)
    own = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if own is not None and not torch.isclose(own.float(), losses[0].float(), rtol=1e-2, atol=1e-3, equal_nan=True):
        raise ValueError(
            f"{type(model).__name__} computes the loss {own.item():.4f} for a sample whose per-sample loss is "
            f"{losses[0].item():.4f}: it has terms of its own. Pass a `compute_loss_func` that returns shape (batch size,)."
        )
