"""What the command line makes of its arguments; that it runs an example is seen with the image one."""

import os
import subprocess
import sys
import types

import pytest
import torch
from transformers import HfArgumentParser

import hf_orthograd
from hf_orthograd import OrthoGradConfig
from hf_orthograd.commands import make_parser, run, scripts
from hf_orthograd.commands.scripts import SCRIPTS, arguments_of, script_path, start
from hf_orthograd.requests.history import GOALS


def test_every_modality_has_its_example():
    for modality in SCRIPTS:
        assert "def main()" in script_path(modality).read_text()


def test_help_waits_for_nothing_slow():
    code = (
        "import sys; from hf_orthograd.commands import make_parser; make_parser().format_help(); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert "hf_orthograd.commands.publishing" in loaded
    assert not {"torch", "transformers", "datasets"}.intersection(loaded)


def test_rooms_come_when_they_are_asked_for():
    code = "import hf_orthograd as h; print(h.evaluation.evaluate_unlearning.__name__, h.OrthoGradConfig.__name__)"
    found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert found.split() == ["evaluate_unlearning", "OrthoGradConfig"]
    with pytest.raises(AttributeError, match="has no attribute 'OrthoGradTrainr'"):
        hf_orthograd.OrthoGradTrainr  # noqa: B018


def test_the_shell_completes_commands_and_arguments(tmp_path):
    def completed(line):
        asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
        found = tmp_path / "found"
        asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(found), "_ARGCOMPLETE_IFS": "\n"}
        finished = subprocess.run([sys.executable, "-m", "hf_orthograd"], env=os.environ | asked, capture_output=True)
        assert finished.returncode == 0, finished.stderr
        return [one.strip() for one in found.read_text().splitlines()]

    assert completed("hf-orthograd re") == ["retract", "requests"]
    assert completed("hf-orthograd verify --sa") == ["--salt"]
    assert completed("hf-orthograd unlearn im") == ["image", "image-text"]


def test_goals_of_the_command_are_those_of_a_request():
    with pytest.raises(SystemExit):
        make_parser().parse_args(["requests", "add", "h", "--forget", "f", "--goal", "gone"])
    for goal in filter(None, GOALS):
        assert make_parser().parse_args(["requests", "add", "h", "--forget", "f", "--goal", goal]).goal == goal


def test_missing_examples_are_said(monkeypatch, tmp_path):
    monkeypatch.setattr(scripts, "_FOLDERS", (tmp_path,))
    with pytest.raises(FileNotFoundError, match="unlearn_text.py is in none of"):
        script_path("text")


def test_yaml_becomes_arguments(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "forget_values: [1088, 'Jane Doe']\nuse_lora: true\nweight_decay: -1.0e-5\nseed: null\nlabel_names: []\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    assert arguments_of(path) == [
        "--forget_values", "1088", "Jane Doe", "--use_lora=True", "--weight_decay=-1e-05",
        '--lr_scheduler_kwargs={"num_cycles": 2}',
    ]  # fmt: skip
    parsed, left = HfArgumentParser(OrthoGradConfig).parse_args_into_dataclasses(
        ["--output_dir", "out", *arguments_of(path)[4:]], return_remaining_strings=True
    )
    assert (parsed.weight_decay, parsed.lr_scheduler_kwargs, left) == (-1e-5, {"num_cycles": 2}, [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must map names of arguments to values"),
        ("- a\n- b", "must map names of arguments to values"),
        ("1: 2", "must map names of arguments to values"),
        ("a: [1", "is no YAML"),
        ("num_processes: 2", "holds num_processes, which the command takes itself"),
        ("forget_values: [no]", "`forget_values` holds False, but must hold texts and numbers. Put texts in quotes."),
        ("forget_values: ['--push_to_hub']", "`forget_values` holds '--push_to_hub'"),
    ],
)
def test_other_yaml_is_refused(tmp_path, capsys, text, said):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert run(["unlearn", "text", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


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
    assert started.pop() == [sys.executable, script, "--max_steps=9", "--alpha", "0.1", "--max_steps", "3", *added]
    run([command, "--num_processes", "2", "speech", "--accelerate_config", "fsdp.yaml"])
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "fsdp.yaml", "--num_processes", "2"]
    assert started.pop() == [sys.executable, *launcher, script, *added]


def test_several_processes_start_without_an_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    script = tmp_path / "one.py"
    script.write_text("import os, pathlib, sys\npathlib.Path(sys.argv[1], os.environ['RANK']).touch()\n")
    assert start(script, [str(tmp_path)], num_processes=2) == 0
    assert {"0", "1"} <= {path.name for path in tmp_path.iterdir()}
