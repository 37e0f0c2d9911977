"""What the command line makes of its arguments; that it runs an example is seen with the image one."""

import subprocess
import sys
import types

import pytest

from hf_orthograd.__main__ import run
from hf_orthograd.launching import SCRIPTS, arguments_of, script_path, scripts


def test_every_modality_has_its_example():
    for modality in SCRIPTS:
        assert "def main()" in script_path(modality).read_text()


def test_missing_examples_are_said(monkeypatch, tmp_path):
    monkeypatch.setattr(scripts, "_FOLDERS", (tmp_path,))
    with pytest.raises(FileNotFoundError, match="unlearn_text.py is in none of"):
        script_path("text")


def test_yaml_becomes_arguments(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "forget_values: [1088, 'Jane Doe']\nuse_lora: true\nlearning_rate: 1.0e-4\nseed: null\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    assert arguments_of(path) == [
        "--forget_values", "1088", "Jane Doe", "--use_lora", "True", "--learning_rate", "0.0001",
        "--lr_scheduler_kwargs", '{"num_cycles": 2}',
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "- a\n- b", "1: 2"])
def test_other_yaml_is_refused(tmp_path, capsys, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert run(["unlearn", "text", "--config", str(path)]) == 1
    assert "must map names of arguments to values" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "added"),
    [("unlearn", []), ("estimate", ["--dry_run", "True"]), ("evaluate", ["--evaluate_only", "True"])],
)
def test_arguments_reach_the_script_after_those_of_the_file(tmp_path, monkeypatch, command, added):
    started = []
    monkeypatch.setattr(
        subprocess, "run", lambda arguments: started.append(arguments) or types.SimpleNamespace(returncode=3)
    )
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 9")
    script = str(script_path("speech"))
    assert run([command, "speech", "--alpha", "0.1", "--config", str(path), "--max_steps", "3"]) == 3
    assert started.pop() == [sys.executable, script, "--max_steps", "9", "--alpha", "0.1", "--max_steps", "3", *added]
    run([command, "--num_processes", "2", "speech", "--accelerate_config", "fsdp.yaml"])
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "fsdp.yaml", "--num_processes", "2"]
    assert started.pop() == [sys.executable, *launcher, script, *added]
