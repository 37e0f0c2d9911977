"""What is saved, what of it can be gone on from, and that all of it comes back."""

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .config import OrthoGradConfig
from .trials import replaced


if TYPE_CHECKING:
    from torch.nn.modules.module import _IncompatibleKeys

    from .trainer import OrthoGradTrainer


logger = logging.get_logger(__name__)

ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)


# ---- Which checkpoint is whole: a run may be killed, or a disk full, in the middle of a save ----


def find_last_checkpoint(folder: str) -> str | None:
    """The newest whole checkpoint in a folder; says which newer ones are not whole.

    Args:
        folder (`str`): The run's `output_dir`.

    Returns:
        Its path, or `None` if there is none that is whole.

    Raises:
        ValueError: There is no checkpoint at all.
    """
    found = sorted(_checkpoints(folder), reverse=True)
    if not found:
        raise ValueError(
            f"`resume_from_checkpoint` is True, but `output_dir` {folder!r} holds no checkpoint. Leave it out to start from "
            "the beginning, or pass the folder of a checkpoint."
        )
    for number, (_, path) in enumerate(found):
        if is_whole(path):
            if number:
                logger.warning(
                    f"{', '.join(path.name for _, path in found[:number])} in {folder!r} was not saved to its end, by a kill or "
                    f"a full disk: going on from {path.name}."
                )
            return str(path)
    logger.warning(
        f"No checkpoint in {folder!r} was saved to its end ({', '.join(path.name for _, path in found)}): starting from the "
        "beginning."
    )
    return None


def _checkpoints(folder: str) -> Iterator[tuple[int, Path]]:
    if os.path.isdir(folder):
        for path in Path(folder).iterdir():
            match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
            if match and path.is_dir():
                yield int(match.group(1)), path


def is_whole(folder: str | Path) -> bool:
    """Whether a checkpoint was saved to its end: the trainer's state is what Trainer writes last, beside it random numbers.

    Of several processes these are numbered; a run may go on with another number of processes.
    """
    folder = Path(folder)
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    numbered = {path.name for path in folder.glob("rng_state_*.pth")}
    return numbered == {f"rng_state_{i}.pth" for i in range(len(numbered))}


def begin_checkpoint(folder: str | Path) -> None:
    """Before a folder is written to: an older state in it would make half a checkpoint look whole."""
    Path(folder, TRAINER_STATE_NAME).unlink(missing_ok=True)


# ---- Adapters: deleting one undoes the unlearning it holds ----


def merges(model: nn.Module, args: OrthoGradConfig, *, sharded: bool) -> bool:
    """Whether an adapter is to be merged when its model is saved for good; under FSDP it cannot be, and says so."""
    if not (args.merge_adapter and isinstance(model, PeftModel)):
        return False
    if sharded:
        logger.warning(
            "A sharded LoRA model cannot be merged here: saving the adapter alone, without which the model remembers. "
            "Before it is used, load it with `AutoPeftModel...from_pretrained` in one process, call `merge_and_unload()` and "
            "save the result."
        )
    return not sharded


def save_merged(trainer: "OrthoGradTrainer", folder: str) -> None:
    """Saves the base model of a LoRA run with the adapter merged into it, as Trainer saves a model."""
    remove_adapter_files(folder)
    with replaced(trainer, "model", merged_copy(trainer.accelerator.unwrap_model(trainer.model))):
        trainer._save(folder)  # not by way of DeepSpeed's own model, which is the one without the merge


def merged_copy(model: PeftModel) -> nn.Module:
    """The base model with the adapter merged into it, a copy on the CPU; the model itself stays as it is."""
    # the copy is told what each tensor becomes, so that none is copied on the device first
    tensors = [*model.parameters(), *model.buffers()]
    memo = {id(tensor): _on_cpu(tensor) for tensor in tensors}
    return copy.deepcopy(model, memo).merge_and_unload(safe_merge=True)


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    copied = tensor.detach().to("cpu", copy=True)
    return nn.Parameter(copied, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def remove_adapter_files(folder: str | Path) -> None:
    """Before merged weights are saved: an adapter beside them would be put on top of them once more when they load."""
    for name in ADAPTER_FILES:
        path = Path(folder, name)
        if path.exists():
            logger.warning(f"Removing {str(path)!r}: the adapter is merged into the weights that are saved beside it.")
            path.unlink()


# ---- Names: Trainer loads a checkpoint into a model by the names that it finds there ----


class CompleteLoading:
    """Loads a checkpoint once more, by `from_pretrained`, if some of its names were not the model's.

    For some architectures (ViT in 5.23) transformers saves the names of older versions, which `from_pretrained` knows to
    translate. What Trainer does not find stays as it is, with a warning: a resumed model would be half another one.
    """

    def __init__(self):
        self._in_part = False

    def is_in_part(self, load_result: "_IncompatibleKeys", model: nn.Module) -> bool:
        """Whether weights were missing that are neither tied nor left out on purpose; [`complete`] then loads them."""
        ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        self._in_part = bool(set(load_result.missing_keys) - ignored - tied)
        return self._in_part

    def complete(self, folder: str, model: nn.Module) -> None:
        """Loads what was missing.

        Raises:
            ValueError: The model has no `from_pretrained`.
        """
        in_part, self._in_part = self._in_part, False
        if not in_part:
            return
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"The checkpoint {folder!r} lacks weights of the model ({type(model).__name__}). Was it saved from another?"
            )
        loaded = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())
