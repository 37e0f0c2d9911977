"""Runs that are killed, or meet a full disk, and go on: python tests/killed.py FOLDER SEED KILLS FULL_DISKS

Prints one line of JSON: for each run how it ended first, from which checkpoint it went on, and whether its parameters are
those of the uninterrupted run, bit for bit. Everything is loaded once; each run is a process of its own, forked from here.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from conftest import MODELS
from launched import samples
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer


STEPS = 8


class FullDisk(TrainerCallback):
    """From a step on no file can be written that is longer than so many bytes: the save of that step breaks off."""

    def __init__(self, step: int, limit: int):
        self.step, self.limit = step, limit

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))


def run(folder: Path, callbacks=(), resume: bool = False) -> None:
    """Dropout, accumulation, AdamW, both streams, NPO's reference losses and the corrected update; saves each step."""
    torch.manual_seed(0)
    model = MODELS["llama"](dropout=0.1)
    args = OrthoGradConfig(
        str(folder), max_steps=STEPS, save_strategy="steps", save_steps=1, save_total_limit=3,
        per_device_train_batch_size=2, per_device_forget_batch_size=2, gradient_accumulation_steps=2, forget_loss="npo",
        optim="adamw_torch", learning_rate=1e-2, weight_decay=0.1, projection_target="update", report_to="none",
        logging_steps=1, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    retain, forget = samples("llama", 10, seed=1), samples("llama", 7, seed=2)
    trainer = OrthoGradTrainer(model, args, train_dataset=retain, forget_dataset=forget, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    torch.save([p.detach() for p in model.parameters()], folder / "final.pt")


def forked(function, *arguments) -> int:
    """The process in which it runs."""
    child = os.fork()
    if child:
        return child
    try:
        # tqdm's own lock is shared by all processes: one that is killed while it holds it stops the others for good
        lock = threading.RLock()
        for kind in _with_subclasses(tqdm):
            kind.set_lock(lock)
        torch.set_num_threads(1)
        function(*arguments)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)


def _with_subclasses(kind: type):
    yield kind
    for each in kind.__subclasses__():
        yield from _with_subclasses(each)


def ending(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def trial(folder: Path, begin, expected: list) -> dict:
    folder.mkdir()
    first = begin(folder)
    found = get_last_checkpoint(folder) if folder.exists() else None
    resumed = ending(forked(run, folder, (), found is not None))
    final = torch.load(folder / "final.pt") if (folder / "final.pt").exists() else None
    same = final is not None and all(torch.equal(a, b) for a, b in zip(final, expected, strict=True))
    return {"first": first, "newest": found and Path(found).name, "resumed": resumed, "same": same}


def main() -> None:
    folder, seed, kills, full_disks = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    draw = random.Random(seed)
    whole = folder / "whole"
    started = time.perf_counter()
    assert ending(forked(run, whole)) == 0
    seconds, expected = time.perf_counter() - started, torch.load(whole / "final.pt")
    sizes = [path.stat().st_size for path in (whole / f"checkpoint-{STEPS}").iterdir()]

    def killed(folder: Path) -> int:
        while True:  # until it comes before the end
            child = forked(run, folder)
            time.sleep(draw.uniform(0.2, 1.0) * seconds)
            os.kill(child, signal.SIGKILL)
            if (code := ending(child)) != 0:
                return code
            shutil.rmtree(folder)

    def full(folder: Path) -> int:
        return ending(forked(run, folder, [FullDisk(draw.randint(1, STEPS - 1), draw.randint(0, max(sizes) - 1))]))

    results = [trial(folder / f"killed-{n}", killed, expected) for n in range(kills)]
    results += [trial(folder / f"full-{n}", full, expected) for n in range(full_disks)]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
