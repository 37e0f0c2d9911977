"""What is built installs by itself: wheel and sdist, each in an environment of its own."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from hf_orthograd import __version__


ROOT = Path(__file__).parent.parent
SMOKE = """
import sys, torch
import hf_orthograd
from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.commands.scripts import SCRIPTS, script_path
assert "site-packages" in hf_orthograd.__file__ and sys.prefix in hf_orthograd.__file__, hf_orthograd.__file__
assert all(script_path(modality).parent.name == "scripts" for modality in SCRIPTS)
model = torch.nn.Linear(4, 2)
model.forward = lambda x, labels=None: {"logits": torch.nn.functional.linear(x, model.weight, model.bias)}
def losses(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")
rows = [{"x": torch.randn(4), "labels": number % 2} for number in range(12)]
args = OrthoGradConfig("out", max_steps=2, report_to="none", use_cpu=True, save_strategy="no", logging_steps=1)
trainer = OrthoGradTrainer(model, args, train_dataset=rows[:8], forget_dataset=rows[8:], compute_loss_func=losses)
trainer.train()
from hf_orthograd.evaluation import evaluate_unlearning
report = evaluate_unlearning(trainer, datasets={"forget": rows[8:], "retain": rows[:8]})
report.save("out")
print("trained", trainer.state.global_step)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=500)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_installs_and_trains(built, kind, tmp_path):
    (package,) = built.glob(kind)
    assert __version__ in package.name
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh" / "bin" / "python"
    # what it requires is that of this environment, as a path: it holds no other hf_orthograd that could be imported there
    environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib"), "HF_HUB_OFFLINE": "1"}
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", package]
    subprocess.run(install, check=True, timeout=500, env=os.environ | {"PYTHONPATH": ""})
    done = subprocess.run(
        [python, "-c", SMOKE], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=500
    )
    assert done.returncode == 0 and "trained 2" in done.stdout, done.stderr[-3000:]
    helped = [tmp_path / "fresh" / "bin" / "hf-orthograd", "--help"]
    assert "unlearn" in subprocess.run(helped, capture_output=True, text=True, cwd=tmp_path, env=environment).stdout
