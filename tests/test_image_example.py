"""The image example as a user runs it, shortened: few epochs, a few steps."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    ViTImageProcessor,
)

from hf_orthograd import OrthoGradConfig
from hf_orthograd.evaluation import UnlearningReport


EXAMPLE = Path(__file__).parent.parent / "examples" / "unlearn_image.py"
sys.path.insert(0, str(EXAMPLE.parent))
import unlearn_image  # noqa: E402


def test_demo_forgets_a_class_and_reports(tmp_path):
    """From the command line, half of it in a file."""
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"finetune_epochs": 1, "max_steps": 9, "seed": None, "report_to": ["none"]}))
    command = [sys.executable, "-m", "hf_orthograd", "unlearn", "image", "--config", str(config), "--max_steps", "3"]
    command += ["--disable_tqdm", "1", "--relearning_steps", "4", "--output_dir", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "## What holds" in finished.stdout
    report = UnlearningReport.load(tmp_path)
    assert report.cost["unlearning"]["steps"] == 3
    assert set(report.models["unlearned"]) == {"forget", "retain", "test", "forget_unseen"}
    assert {"original", "reference", "unlearned, int8", "reference, int4"} <= set(report.models)
    assert report.models["unlearned"]["forget"].size == 128 and report.models["unlearned"]["retain"].size == 120
    assert "3" not in report.models["unlearned"]["test"].groups
    assert all(check.holds is not None for check in report.checks)
    assert [point.step for point in report.relearning["relearning"]["reference"]] == [0, 1, 4]
    for figure in ("losses", "relearning", "cost", "tradeoff"):
        assert (tmp_path / f"{figure}.png").read_bytes()[:4] == b"\x89PNG"
    AutoModelForImageClassification.from_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(tmp_path)
    trained = [AutoModelForImageClassification.from_pretrained(tmp_path / name) for name in ("finetuned", "retrained")]
    assert not torch.equal(*(model.classifier.weight for model in trained))
    AutoImageProcessor.from_pretrained(tmp_path / "finetuned")


def test_video_model_forgets_a_movement(tmp_path, monkeypatch):
    quiet = ("--video", "--report_to", "none", "--disable_tqdm", 1, "--use_cpu", 1)
    short = ("--finetune_epochs", 0, "--retrain", 0, "--max_steps", 2, "--relearning_steps", 0, "--retain_size", 60)
    short += ("--output_dir", tmp_path)
    make, counts = unlearn_image.make_videos, {"train": 240, "test": 96}
    monkeypatch.setattr(unlearn_image, "make_videos", lambda _: make(counts))
    monkeypatch.setattr(sys, "argv", ["unlearn_image.py", *map(str, [*quiet, *short])])
    unlearn_image.main()
    report = UnlearningReport.load(tmp_path)
    assert report.models["unlearned"]["forget"].size == 40 and "left" not in report.models["unlearned"]["test"].groups
    AutoModelForVideoClassification.from_pretrained(tmp_path)


@pytest.fixture
def folder(tmp_path, make_model):
    """A small ViT with its processor, and images as one would download them, of two classes under other names."""
    model = make_model("vit")
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(0)
    features = Features({"picture": Image(), "kind": ClassLabel(names=["cat", "dog"])})
    corpus = {}
    for split, count in (("train", 40), ("test", 12)):
        pictures = list(generator.integers(0, 255, (count, 20, 20, 3), dtype=np.uint8))
        corpus[split] = Dataset.from_dict({"picture": pictures, "kind": [0, 1] * (count // 2)}, features=features)
    (tmp_path / "corpus").mkdir()
    for split, rows in DatasetDict(corpus).items():
        rows.to_parquet(tmp_path / "corpus" / f"{split}-00000-of-00001.parquet")
    return tmp_path


def test_random_images_of_a_folder(folder, monkeypatch, capsys):
    """In this process: a fresh one takes ten seconds to import what it needs."""
    inputs = [
        "--model_name_or_path",
        folder / "model",
        "--dataset_name",
        folder / "corpus",
        "--image_column",
        "picture",
    ]
    inputs += ["--label_column", "kind", "--output_dir", folder / "out", "--report_to", "none", "--use_cpu", "1"]
    own = ["--forget_fraction", 0.1, "--retain_size", 12, "--max_steps", 4, "--per_device_forget_batch_size", 4]
    own += ["--retain_loss", "kl", "--learning_rate", 0.1, "--per_device_train_batch_size", 6]
    varied = []
    vary = unlearn_image.VaryImages.vary
    monkeypatch.setattr(
        unlearn_image.VaryImages, "vary", lambda self, image: varied.append(image) or vary(self, image)
    )
    monkeypatch.setattr(sys, "argv", ["unlearn_image.py", *map(str, [*inputs, *own, "--relearning_steps", 0])])
    unlearn_image.main()
    report = UnlearningReport.load(folder / "out")
    assert report.models["unlearned"]["forget"].size == 4
    assert all(check.holds is None for check in report.checks)  # there is no reference
    # those of two steps of four: by then the forgotten are at the level of test images
    assert 2 * 6 <= len(varied) < 4 * 6
    model = AutoModelForImageClassification.from_pretrained(folder / "out")
    assert model.config.id2label == {0: "cat", 1: "dog"}

    # the same numbers from the saved model alone
    saved = folder / "out"
    again = [*inputs, *own, "--evaluate_only", "--relearning_steps", 0, "--model_name_or_path", saved]
    again += ["--original_name_or_path", saved, "--reference_name_or_path", saved, "--output_dir", folder / "again"]
    monkeypatch.setattr(sys, "argv", ["unlearn_image.py", *map(str, again)])
    unlearn_image.main()
    measured = UnlearningReport.load(folder / "again").models
    assert measured["unlearned"] == measured["original"] == measured["reference"] == report.models["unlearned"]
    assert not (folder / "again" / "model.safetensors").exists()

    monkeypatch.setattr(sys, "argv", ["unlearn_image.py", *map(str, [*inputs, *own, "--dry_run"])])
    unlearn_image.main()
    assert "x GradDiff" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["unlearn_image.py", *map(str, inputs), "--forget_values", "bird"])
    with pytest.raises(ValueError, match=r"`--forget_values` \['bird'\] are no classes of the data set, which has"):
        unlearn_image.main()


def test_stops_where_the_retrained_model_would_be(make_model, tmp_path):
    args = OrthoGradConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, stop_metric="accuracy")
    arguments = unlearn_image.ScriptArguments(retrain=True)
    rows = [{"pixel_values": np.zeros((3, 16, 16), np.float32), "labels": label} for label in (0, 1, 1, 1)]
    reference = make_model("vit")
    with torch.no_grad():
        reference.classifier.bias.copy_(
            torch.nn.functional.one_hot(torch.tensor(1), reference.config.num_labels) * 100.0
        )
    stopped = unlearn_image.stopping_in_time(args, reference, {"forget": rows}, arguments)
    assert (stopped.forget_target, stopped.eval_strategy, stopped.eval_steps) == (0.75, "steps", 2)
    # without a retrained model unseen images tell how random ones would look, but not those of a class
    assert unlearn_image.stopping_in_time(args, None, {}, arguments).forget_target == "reference"
    assert unlearn_image.stopping_in_time(args, None, {"forget_unseen": rows}, arguments) is args
    own = replace(args, forget_target=0.5, eval_strategy="epoch")
    assert unlearn_image.stopping_in_time(own, reference, {"forget": rows}, arguments) is own
    assert unlearn_image.stopping_in_time(args, reference, {}, replace(arguments, stop_in_time=False)) is args
