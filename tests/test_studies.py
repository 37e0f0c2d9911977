"""What the studies' tables rest on: resuming, the choice of settings, intervals."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import TrainerCallback

from hf_orthograd import OrthoGradConfig


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "studies"))

import ablations
import curves
import erasure
import images
import retention
import text
from harness import Records
from image_data import Request
from methods import METHODS, Bench
from retain_memory import RetainMemoryTrainer
from tables import choose, gap, mean_and_interval, recovery, write_report


def record(forget, retain, test, auc, *, validation=None, steps=5, curve=((0, 0.1), (5, 0.3), (25, 0.9))):
    quality = {"forget": forget, "at_hand": retain, "retain": retain, "test": test, "validation": validation or test}
    return {
        "quality": {name: [value, 1.0] for name, value in quality.items()},
        "auc": {"test": auc, "validation": auc},
        "ks": 0.2,
        "int8": {"forget": [forget, 1.0]},
        "int4": {"forget": [forget, 1.0]},
        "relearning": [[step, value, 1.0] for step, value in curve],
        "seconds": 2.0,
        "steps": steps,
        "setting": 1e-4,
        "failed": None,
    }


def test_finished_runs_are_not_made_again(tmp_path):
    path = tmp_path / "study.json"
    first = Records(path)
    assert first.get("a", lambda: {"value": 1}) == {"value": 1}
    again = Records(path)
    assert again.get("a", lambda: pytest.fail("made again")) == {"value": 1}
    again.get("b", lambda: {"value": [2]})
    assert json.loads(path.read_text())["runs"] == {"a": {"value": 1}, "b": {"value": [2]}}
    assert "torch" in json.loads(path.read_text())["machine"]
    assert again.get("a", lambda: {"value": 3, "int4": 0}, complete="int4") == {"value": 3, "int4": 0}
    assert Records(path).get("a", lambda: pytest.fail("made again"), complete="int4")["value"] == 3


def test_two_processes_keep_each_others_runs(tmp_path):
    path = tmp_path / "study.json"
    first, second = Records(path), Records(path)
    first.get("a", lambda: {"value": 1})
    second.get("b", lambda: {"value": 2})  # which had read the file before "a" was there
    assert json.loads(path.read_text())["runs"] == {"a": {"value": 1}, "b": {"value": 2}}
    assert first.get("b", lambda: pytest.fail("made again")) == {"value": 2}


def test_settings_are_chosen_on_validation_data():
    reference = record(0.5, 0.7, 0.5, 0.5)
    runs = {
        1.0: record(0.5, 0.7, 0.1, 0.5, validation=0.5),  # right on validation data alone
        2.0: record(0.5, 0.7, 0.5, 0.5, validation=0.1),
        3.0: record(0.5, 0.7, 0.5, 0.5, validation=0.5) | {"failed": "not finite"},
    }
    assert choose(runs, reference) == 1.0
    assert gap(runs[1.0], reference) == pytest.approx(0.1)


def test_recovery_is_where_half_is_back():
    original, reference, unlearned = record(0.9, 1, 1, 0.5), record(0.1, 1, 1, 0.5), record(0.1, 1, 1, 0.5)
    assert recovery(unlearned, original, reference, 1) == 25  # half is 0.5
    assert recovery(record(0.1, 1, 1, 0.5, curve=((0, 0.1), (25, 0.4))), original, reference, 1) is None
    # of an error rate less is better
    rates = record(0.1, 0, 0, 0.5, curve=((0, 0.8), (5, 0.4)))
    assert recovery(rates, record(0.0, 0, 0, 0.5), record(0.9, 0, 0, 0.5), -1) == 5


def test_interval_is_students():
    values = [0.2, 0.3, 0.5]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert mean_and_interval(values) == f"{np.mean(values):.3f} ± {(high - low) / 2:.3f}"
    assert mean_and_interval([0.25]) == "0.250"


def test_report_leaves_out_what_lacks_a_seed(tmp_path):
    runs = {
        f"{what} class-{seed}": record(0.5, 0.7, 0.5, 0.5) for what in ("original", "retrained") for seed in (0, 1)
    }
    runs |= {f"final class-{seed} 0.05 orthograd": record(0.4, 0.6, 0.5, 0.5) for seed in (0, 1)}
    runs["final class-0 0.05 npo"] = record(0.4, 0.6, 0.5, 0.5)
    write_report(runs, tmp_path / "study", "class", [0, 1], ["0.05", "0.2"], 1)
    text = (tmp_path / "study.md").read_text()
    assert "means over 2 seeds" in text and "5% of the retain set" in text and "20%" not in text
    assert "| OrthoGrad, ascent | 0.400 ± 0.000 | 0.600 ± 0.000 |" in text and "NPO |" not in text
    assert (tmp_path / "study.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_valid_configuration(name, tmp_path):
    rule = {"eval_strategy": "steps", "eval_steps": 2, "forget_target": "reference"}
    bench = Bench({"output_dir": str(tmp_path), "max_steps": 6, **rule}, tuple(rule), {}, None, {}, {})
    args = bench.args(METHODS[name], 1e-3, seed=0)
    assert args.max_steps == 6 * METHODS[name].steps
    assert (args.forget_target == "reference") == METHODS[name].rule


class Gradients(TrainerCallback):
    """Keeps what reaches the optimizer, step by step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_retain_memory_projects_out_earlier_gradients_too(make_model, make_samples, tmp_path, alpha):
    args = OrthoGradConfig(
        str(tmp_path), max_steps=2, optim="sgd", learning_rate=0.1, max_grad_norm=0, alpha=alpha, forget_loss="ascent",
        per_device_train_batch_size=3, per_device_forget_batch_size=3, save_strategy="no", report_to="none",
        disable_tqdm=True, monitor_steps=0,
    )  # fmt: skip
    sets = {"train_dataset": make_samples("vit", 6, seed=1), "forget_dataset": make_samples("vit", 6, seed=2)}
    seen = Gradients()
    trainer = RetainMemoryTrainer(make_model("vit"), args, **sets, remembered_steps=2, callbacks=[seen])
    trainer.train()
    second, first = (
        torch.cat([own.flatten(1) for own in rows.values()], dim=1) for rows in trainer.gradient_engine.past
    )
    for gradient, rows in zip(seen.gradients, (first, torch.cat([second, first])), strict=True):
        ascended = (alpha * rows[:3].mean(0) - gradient) / (1 - alpha)
        cosines = torch.cosine_similarity(rows, ascended[None])
        assert ascended.norm() > 1e-3 and cosines.abs().max() < 1e-4
    # what the second step took from the first one's samples is not nothing
    assert torch.cosine_similarity(first, second).abs().max() > 1e-2


def test_plotted_variants_exist():
    plotted = [name for curves in ablations.CURVES.values() for points in curves.values() for name in points.values()]
    assert set(plotted) <= set(ablations.VARIANTS)


VARIANTS = [*ablations.VARIANTS.values()]
VARIANTS += [(method, changes) for variants in erasure.VARIANTS.values() for method, _, changes in variants.values()]


@pytest.mark.parametrize(("method", "changes"), VARIANTS)
def test_every_variant_has_a_valid_configuration(method, changes, tmp_path):
    rule = {"eval_strategy": "steps", "eval_steps": 2, "forget_target": "reference"}
    bench = Bench({"output_dir": str(tmp_path), "max_steps": 6, **rule}, tuple(rule), {}, None, {}, {})
    changes = {name: value for name, value in changes.items() if name != ablations.LORA}
    args = bench.args(METHODS[method], 1e-4, seed=0, extra=changes)
    for name, value in changes.items():
        assert getattr(args, name) == (value * METHODS[method].steps if name == "max_steps" else value)


RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def numbers_of(path):
    """All lines but that of the machine on which the table was written."""
    return [line for line in path.read_text().splitlines() if not line.startswith("(")]


@pytest.mark.parametrize("kind", ["random", "class"])
def test_tables_of_the_image_study_are_those_of_its_records(kind, tmp_path):
    runs = json.loads((RESULTS / "study_images.json").read_text())["runs"]
    name = f"study_images_{kind}"
    write_report(runs, tmp_path / name, kind, range(3), ("0.05", *images.ImageStudy.sizes), 1)
    assert numbers_of(tmp_path / f"{name}.md") == numbers_of(RESULTS / f"{name}.md")


def test_table_of_retain_terms_is_that_of_its_records(tmp_path):
    runs = json.loads((RESULTS / "study_retention.json").read_text())["runs"]
    retention.write_report(runs, tmp_path / "table.md", ["random", "class"], range(8))
    assert numbers_of(tmp_path / "table.md") == numbers_of(RESULTS / "study_retention.md")


def test_the_attack_in_the_guide_is_that_of_the_table():
    """Whose rows a study wrote from its records."""
    guide = (RESULTS.parent.parent / "docs" / "evaluating.md").read_text()
    rows = [line for line in (RESULTS / "study_lira.md").read_text().splitlines() if line.startswith("| ")][1:]
    shown = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    longer = [cells for cells in shown if "at most" in cells[0]]
    assert len(shown) - len(longer) == 10 and len(longer) >= 2
    for label, *cells in shown:
        auc, steps, unlearned, unseen, spread = cells[0], *cells[3:7]
        row = [steps, unlearned, unseen, auc, spread or "not measured"] if "at most" in label else cells[:3]
        assert f" | {' | '.join(row)} |" in guide


def test_curves_under_kl_are_those_of_their_records(tmp_path):
    runs, references = (
        json.loads((RESULTS / f"study_{name}.json").read_text())["runs"] for name in ("curves", "retention")
    )
    curves.write_report(runs, references, tmp_path / "table")
    assert numbers_of(tmp_path / "table.md") == numbers_of(RESULTS / "study_curves.md")


def test_curves_are_of_the_seeds_that_have_every_point(tmp_path):
    """And their differences are paired: the projection is nearer by 0.02 in each seed, however far the seeds are apart."""
    runs = {}
    references = {f"retrained random-{seed}": record(0.5, 0.7, 0.5, 0.5) for seed in range(3)}
    what, (quantity, values) = next(iter(curves.CURVES.items()))
    for seed in range(3):
        for value in values[: None if seed < 2 else 1]:  # the third seed has one point
            for method, more in (("orthograd_npo", 0.0), ("npo", 0.02)):
                off = 0.1 * seed + more
                name = curves.name_of(method, curves.USUAL | {quantity: value}, Request("random", seed))
                runs[name] = record(0.5 + off, 0.7 + off, 0.5 + off, 0.5 + off)
    curves.write_report(runs, references, tmp_path / "table")
    written = (tmp_path / "table.md").read_text()
    assert f"## random, {what}, 2 seeds" in written and "## class" not in written
    row = next(line for line in written.splitlines() if line.startswith("| 4 |"))
    assert row.startswith("| 4 | 0.050 ± 0.635 | 0.070 ± 0.635 | 0.020 ± 0.000 |")


def test_differences_to_the_default_are_paired(tmp_path):
    """Gaps that differ by 0.02 in each seed, however far the seeds are apart, differ by 0.02 without doubt."""
    runs = {}
    for seed in range(4):
        off = 0.02 * seed
        runs[f"retrained random-{seed}"] = record(0.5, 0.7, 0.5, 0.5)
        for variant, more in ((retention.DEFAULT, 0.0), ("NPO", 0.02)):
            runs[f"final random-{seed} 0.05 {variant}"] = record(
                *(0.5 + off + more, 0.7 + off + more, 0.5 + off + more), 0.5 + off + more
            )
    retention.write_report(runs, tmp_path / "table.md", ["random", "class"], range(4))
    row = next(line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| NPO |"))
    assert "| 0.050 ± 0.041 | 0.020 ± 0.000 |" in row


def answers(forget, utility, steps=None):
    """A record of the study of text."""
    sets = {
        name: {"probability": 0.5, "rouge": forget} for name in ("forget", "retain", "real_authors", "world_facts")
    }
    record = {"sets": sets, "utility": utility, "truth_ratios": [forget, forget + 0.1], "extraction": 0.1}
    record |= {"forget_loss": 2.0, "quality": 0.04}
    return record if steps is None else record | {"steps": steps, "seconds": 3.0 * steps, "rate": 2e-5}


def test_the_study_of_text_compares_at_the_same_requests(tmp_path):
    study = object.__new__(text.TextStudy)
    study.authors, study.forgotten, study.records = 6, 1, Records(tmp_path / "records.json")
    study.at_hand, study.asked = 4, 20
    runs = study.records.runs
    for seed in (0, 1):
        request = study.request(seed)
        runs |= {f"original, {request}": answers(0.9, 0.5), f"retrained, {request}": answers(0.2, 0.5)}
        runs[f"{text.DEFAULT}, full, {request}"] = answers(0.3, 0.4 + 0.1 * seed, 10)
        runs[f"NPO, full, {request}"] = answers(0.4, 0.3 + 0.1 * seed, 20)
    runs[f"GradDiff, full, {study.request(0)}"] = answers(0.4, 0.3, 20)  # of one request alone
    text.write_report(study, tmp_path / "table")
    written = (tmp_path / "table.md").read_text()
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in written.splitlines() if line[:2] == "| "
    }
    assert "## All parameters, 2 requests" in written and "LoRA" not in written.split("## ", 2)[1]
    assert set(rows) == {"method", "original", "retrained", "NPO", text.DEFAULT}
    assert rows["NPO"][2] == "-0.100 ± 0.000" and rows[text.DEFAULT][2] == ""  # paired: the same in each request
    assert rows["NPO"][-4:-1] == ["2e-05", "20, 20", "3.00"]
    assert rows["retrained"][0] == "1, 1"
    assert (tmp_path / "table.png").exists()


def test_a_request_on_text_splits_the_others():
    study = object.__new__(text.TextStudy)
    study.authors, study.forgotten, study.asked, study.at_hand = 4, 1, 4, 4
    study.rows = [{"question": str(number), "perturbed_answer": []} for number in range(4 * text.QUESTIONS)]
    for row in study.rows[:20]:
        del row["perturbed_answer"]  # as of most authors
    rows = {name: {int(row["question"]) for row in own} for name, own in study.split(study.request(1)).items()}
    assert rows["forget"] == set(range(40, 60))
    assert rows["others"] == set(range(80)) - rows["forget"]
    assert [len(rows[name]) for name in ("at_hand", "retain", "validation")] == [15, 4, 8]
    assert not rows["at_hand"] & rows["retain"] and rows["at_hand"] | rows["retain"] <= rows["others"]
    assert not rows["validation"] & (rows["at_hand"] | rows["retain"]) and rows["validation"] <= rows["others"]
    assert all(number >= 20 for number in rows["retain"])


def test_a_learning_rate_is_one_that_forgets_enough():
    found = {1: (1.0, 0.9), 2: (2.1, 0.5), 3: (3.0, 0.4)}
    runs = {rate: {"forget_loss": loss, "validation": kept} for rate, (loss, kept) in found.items()}
    assert text.choose_rate(runs, target=2.0) == 2
    assert text.choose_rate(runs, target=4.0) == 3
    assert text.choose_rate({0: {"forget_loss": np.nan, "validation": 1.0}} | runs, target=2.0) == 2
