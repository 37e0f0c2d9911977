"""Killed in the middle of a step and started again, a run ends where the uninterrupted one does, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched import train

from hf_orthograd.checkpoints import begin_checkpoint, find_last_checkpoint, is_whole


TESTS = Path(__file__).parent


def trials(folder, *numbers):
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "killed.py"), str(folder), *map(str, numbers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("kills", "full_disks"), [(2, 1), pytest.param(20, 10, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_or_meets_a_full_disk_goes_on_bit_for_bit(kills, full_disks, tmp_path):
    """At random moments, saving included: dropout, accumulation, AdamW, both streams, NPO's references, corrected updates."""
    results = trials(tmp_path, 0, kills, full_disks)
    assert len(results) == kills + full_disks
    assert all(one["first"] == -signal.SIGKILL for one in results[:kills])
    assert all(one["first"] == 1 for one in results[kills:])  # the save raised
    assert all(one["resumed"] == 0 and one["same"] for one in results), results


def whole_checkpoint(folder, step):
    folder = folder / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_the_newest_whole_checkpoint_is_found(tmp_path, caplog):
    whole_checkpoint(tmp_path, 9)
    whole_checkpoint(tmp_path, 10)
    (tmp_path / "checkpoint-11").mkdir()  # broke off before the state
    (whole_checkpoint(tmp_path, 12) / "trainer_state.json").write_text('{"global_step": 12, "log_hi')
    (tmp_path / "checkpoint-x").mkdir()
    assert find_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert "checkpoint-12, checkpoint-11" in caplog.text and "going on from checkpoint-10" in caplog.text
    # of two processes: the random numbers of the first are missing
    (tmp_path / "checkpoint-10" / "rng_state_1.pth").touch()
    assert find_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-10" / "rng_state_0.pth").touch()
    assert find_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    for number in (9, 10):
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").unlink()
    assert find_last_checkpoint(str(tmp_path)) is None and "starting from the beginning" in caplog.text


def test_a_checkpoint_that_is_written_over_does_not_look_whole(tmp_path):
    folder = whole_checkpoint(tmp_path, 3)
    begin_checkpoint(folder)
    assert not is_whole(folder)


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2", "vit"])
def test_every_weight_of_a_checkpoint_comes_back(kind, tmp_path):
    """Also where transformers saves other names than the model's own, as it does for a ViT."""
    settings = {"per_device_train_batch_size": 4, "per_device_forget_batch_size": 4}
    settings |= {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.5}
    first = train(tmp_path, kind, False, settings)
    resumed = train(tmp_path, kind, False, settings, resume=tmp_path / "checkpoint-2")
    for one, other in zip(first.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("saves", [True, False])
def test_a_late_process_leaves_the_new_state_alone(saves, tmp_path, monkeypatch):
    """Of several processes only the one that saves may take an older state away."""
    trainer = train(tmp_path, "vit", False, {"max_steps": 1})
    monkeypatch.setattr(type(trainer.args), "should_save", saves)
    folder = whole_checkpoint(tmp_path, 7)
    trainer.save_model(str(folder), _internal_call=True)
    assert is_whole(folder) != saves
