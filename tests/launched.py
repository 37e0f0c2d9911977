"""Trains tiny models for three steps under whatever launch runs it, and saves what became of their parameters.

    python -m torch.distributed.run --nproc-per-node 2 tests/launched.py FOLDER JSON

JSON is a list of runs: a name, the kind of model, whether by LoRA, and settings of the configuration.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from conftest import MODELS, Samples, make_example
from peft import LoraConfig, get_peft_model

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer


def samples(kind: str, count: int, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    return Samples([make_example(kind, number, generator) for number in range(count)])


def train(folder: Path, kind: str, lora: bool, settings: dict) -> OrthoGradTrainer:
    torch.manual_seed(0)
    model = MODELS[kind]()
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
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
    args = OrthoGradConfig(str(folder), **(defaults | settings))
    retain, forget = samples(kind, 24, seed=1), samples(kind, 24, seed=2)
    trainer = OrthoGradTrainer(model, args, train_dataset=retain, forget_dataset=forget)
    trainer.train()
    return trainer


def main() -> None:
    folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    for name, kind, lora, settings in runs:
        trainer = train(folder, kind, lora, settings)
        if trainer.is_world_process_zero():
            trained = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
            logs = [entry for entry in trainer.state.log_history if "kept_signal" in entry]
            torch.save({"parameters": trained, "logs": logs}, folder / f"{name}.pt")
    PartialState().wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # taking gloo's threads down in order aborts or hangs now and then


if __name__ == "__main__":
    main()
