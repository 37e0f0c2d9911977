"""Killed in the middle of a step and started again, a run ends where the uninterrupted one does, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched import train


TESTS = Path(__file__).parent


def run(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(TESTS / "killed.py"), str(folder), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("step", [5, 8])
def test_killed_run_resumes_bit_for_bit(step, tmp_path):
    """Dropout, accumulation, AdamW, both streams, NPO's reference losses and the corrected update."""
    whole = run(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-2000:]
    killed = run(tmp_path / "killed", str(step))
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "final.pt").exists()
    resumed = run(tmp_path / "killed")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    expected, found = (torch.load(tmp_path / name / "final.pt") for name in ("whole", "killed"))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    # it did go on from a checkpoint
    assert f"checkpoint-{(step - 1) // 2 * 2}" in {path.name for path in (tmp_path / "killed").iterdir()}


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2", "vit"])
def test_every_weight_of_a_checkpoint_comes_back(kind, tmp_path):
    """Also where transformers saves other names than the model's own, as it does for a ViT."""
    settings = {"per_device_train_batch_size": 4, "per_device_forget_batch_size": 4}
    settings |= {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.5}
    first = train(tmp_path, kind, False, settings)
    resumed = train(tmp_path, kind, False, settings, resume=tmp_path / "checkpoint-2")
    for one, other in zip(first.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
