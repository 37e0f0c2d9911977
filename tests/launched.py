"""Trains tiny models for three steps under whatever launch runs it, and saves what became of their parameters.

A run has a name, the kind of model, whether by LoRA, and settings of the configuration; `scaling` has fp16 run as on a GPU, with the
arguments of torch's gradient scaler.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from conftest import MODELS, Samples, make_example
from peft import LoraConfig, get_peft_model
from processes import run_in_processes
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.evaluation import Quantization, Relearning, evaluate_unlearning


KINDS = ["whisper", "vit", "llama"]


def settings(per_device, accumulation=1, **others):
    return {
        "per_device_train_batch_size": per_device,
        "per_device_forget_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        **others,
    }


def launch(folder, processes, runs):
    """Trains in several processes; returns what each run saved."""
    run_in_processes(processes, folder, train_all, folder, runs)
    return {name: torch.load(folder / f"{name}.pt") for name, *_ in runs}


def samples(kind: str, count: int, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    return Samples([make_example(kind, number, generator) for number in range(count)])


def _without_padding(example: dict) -> dict:
    return {name: values[example["attention_mask"].bool()] for name, values in example.items()}


def pad(examples: list[dict]) -> dict:
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: pad_sequence([example[name] for example in examples], batch_first=True, padding_value=fill[name])
        for name in examples[0]
    }


def shard_on_cpu(trainer: OrthoGradTrainer) -> None:
    """Accelerate shards models on accelerators alone, though torch can on a CPU: tells it that this is one."""
    plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    trainer.is_fsdp_enabled = True


class SkipFirst(TrainerCallback):
    """Has the first step of the optimizer do nothing."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            model.zero_grad()


def train(
    folder: Path, kind: str, lora: bool, settings: dict, skip_first: bool = False, resume=None
) -> OrthoGradTrainer:
    torch.manual_seed(0)
    settings = dict(settings)
    head, unused = settings.pop("head", None), settings.pop("unused", False)
    model = MODELS[kind]()
    if lora:
        adapter = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "modules_to_save": head}
        model = get_peft_model(model, LoraConfig(**adapter))
    if unused:
        model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    defaults = {
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    scaling, ragged, count = settings.pop("scaling", None), settings.pop("ragged", False), settings.pop("count", 24)
    poisoned, _ = settings.pop("poisoned", None), settings.pop("examined", None)
    make = settings.pop("make", OrthoGradTrainer)
    args = OrthoGradConfig(str(folder), **(defaults | settings))
    retain, forget = samples(kind, count, seed=1), samples(kind, count, seed=2)
    if ragged:  # batches as long as their longest sequence
        retain, forget = (Samples([_without_padding(e) for e in own.examples]) for own in (retain, forget))
    if poisoned is not None:
        retain.examples[poisoned]["pixel_values"].fill_(torch.nan)
    callbacks = [SkipFirst()] if skip_first else None
    trainer = make(
        model, args, pad if ragged else None, train_dataset=retain, forget_dataset=forget, callbacks=callbacks
    )
    if args.fsdp:
        shard_on_cpu(trainer)
    if scaling is not None:  # accelerate itself leaves fp16 out on a CPU, though torch offers all of it
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", **scaling)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def examine(trainer: OrthoGradTrainer, kind: str) -> str:
    """The report on sets that fill no batch of several processes, as JSON."""
    torch.manual_seed(1)
    trainer.args.per_device_eval_batch_size = 3
    sets = {"forget": samples(kind, 13, seed=2), "retain": samples(kind, 7, seed=1), "test": samples(kind, 11, seed=3)}
    attack = Relearning(samples(kind, 8, seed=4), trainer, max_steps=2, learning_rate=0.05, steps=(1,))
    report = evaluate_unlearning(
        trainer, MODELS[kind](), [Quantization(8), attack], datasets=sets, group_column="labels"
    )
    report.history, report.cost = [], {}
    return report.to_json()


def card_errors(trainer: OrthoGradTrainer) -> list[str | None]:
    """What each process says where what may be published cannot be written."""
    error = None
    try:
        trainer.create_model_card()
    except (ValueError, RuntimeError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    return gather_object([error])


def train_all(folder: Path, runs: list) -> None:
    """What each process does."""
    for name, kind, lora, settings in runs:
        if "poisoned" in settings:
            with pytest.raises(FloatingPointError) as raised:
                train(folder, kind, lora, settings)
            message = str(raised.value)
            torch.save({"message": message}, folder / f"{name}{PartialState().process_index or ''}.pt")
            continue
        trainer = train(folder, kind, lora, settings)
        trained = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
        errors = None
        if trainer.args.fsdp:
            trained = {n: p.full_tensor() for n, p in trained.items()}
            trainer.save_model(folder / f"{name}-saved")
            errors = card_errors(trainer)
        report = examine(trainer, kind) if "examined" in settings else None
        if trainer.is_world_process_zero():
            logs = [entry for entry in trainer.state.log_history if "kept_signal" in entry]
            saved = {"parameters": trained, "logs": logs, "report": report, "card_errors": errors}
            torch.save(saved, folder / f"{name}.pt")
        else:
            torch.save(trained, folder / f"{name}-{trainer.accelerator.process_index}.pt")
    leave_together()


def leave_together() -> None:
    PartialState().wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # taking gloo's threads down in order aborts or hangs now and then
