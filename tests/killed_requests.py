"""A history of five requests that is killed and goes on: python tests/killed_requests.py FOLDER SEED KILLS

Prints one line of JSON: for each trial the moment of the kill as a share of the whole, and whether every model ends as in the
uninterrupted history, bit for bit, with its records and chain in order and nothing left behind.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import MODELS
from killed import ending, forked
from launched import samples
from published import rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer, publishing
from hf_orthograd.requests import RequestHistory


REQUESTS, STEPS = 5, 3


def make_trainer(model, forget, retain, output_dir):
    args = OrthoGradConfig(
        output_dir, max_steps=STEPS, save_strategy="steps", save_steps=1, save_total_limit=2,
        per_device_train_batch_size=2, per_device_forget_batch_size=2, learning_rate=1e-2, retain_loss="kl",
        report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(model, attention_dropout=0.1)
    return OrthoGradTrainer(loaded, args, train_dataset=rows(samples("llama", 6, seed=99)), forget_dataset=forget)


def carry_out(folder: Path) -> None:
    """From wherever it stands: begins the history, adds the requests that are not there, runs those that are pending."""
    if (folder / "history.json").exists():
        history = RequestHistory(folder)
    else:
        history = RequestHistory.create(folder, folder.with_name("original"))
    known = {request.request_id for request in history.requests}
    for number in range(REQUESTS):
        if f"case-{number}" not in known:
            history.add(rows(samples("llama", 3, seed=number)), request_id=f"case-{number}")
    history.run(make_trainer, hold_earlier=True)


def is_as_expected(folder: Path, expected: list[dict]) -> bool:
    history = RequestHistory(folder)
    models = [request.model for request in history.requests]
    found = [load_file(model / "model.safetensors") for model in models]
    same = len(found) == REQUESTS and all(
        torch.equal(own[name], one[name]) for own, one in zip(found, expected, strict=True) for name in one
    )
    in_order = all(publishing.verify(model) == [] for model in models)
    in_order = in_order and len(publishing.load_records(history.model)) == REQUESTS
    left = [
        path.name
        for path in folder.rglob("*")
        if path.name in ("run", "public") or path.suffix in (".partial", ".removed")
    ]
    return same and in_order and not left and all(not one.problems for one in history.check())


def main() -> None:
    folder, seed, kills = Path(sys.argv[1]), *map(int, sys.argv[2:4])
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    MODELS["llama"](0.0).save_pretrained(folder / "original")
    started = time.perf_counter()
    assert ending(forked(carry_out, folder / "whole")) == 0
    seconds = time.perf_counter() - started
    expected = [load_file(one.model / "model.safetensors") for one in RequestHistory(folder / "whole").requests]
    results = []
    for number in range(kills):
        own = folder / f"killed-{number}"
        while True:  # until it comes before the end
            share = draw.uniform(0.0, 1.0)
            child = forked(carry_out, own)
            time.sleep(share * seconds)
            os.kill(child, signal.SIGKILL)
            if ending(child) != 0:
                break
            shutil.rmtree(own)
        resumed = ending(forked(carry_out, own))
        done = resumed == 0 and is_as_expected(own, expected)
        results.append({"killed at": round(share, 2), "resumed": resumed, "same": done})
        shutil.rmtree(own)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
