"""A model's history of requests: what is carried out, checked, taken back, and what a kill leaves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from filelock import FileLock
from published import rows
from safetensors.torch import load_file
from transformers import TrainerCallback, ViTForImageClassification

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer, publishing
from hf_orthograd.data import VaryImages
from hf_orthograd.evaluation import evaluate_unlearning
from hf_orthograd.objectives import PerSampleLoss
from hf_orthograd.requests import RequestHistory


RETAIN_ROWS = 8
TESTS = Path(__file__).parent


@pytest.fixture
def sets(make_samples):
    """Three forget sets and a retain set."""
    own = {f"forget {n}": rows(make_samples("vit", 4, seed=n)) for n in (1, 2, 3)}
    return own | {"retain": rows(make_samples("vit", RETAIN_ROWS, seed=9))}


@pytest.fixture
def history(tmp_path, make_model):
    make_model("vit").save_pretrained(tmp_path / "original")
    return RequestHistory.create(tmp_path / "history", tmp_path / "original")


def maker(retain_rows, **config):
    """A trainer's maker that brings its own retain rows where the request has none."""

    def make(model, forget, retain, output_dir):
        settings = {"max_steps": 3, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1} | config
        args = OrthoGradConfig(
            output_dir, per_device_train_batch_size=4, per_device_forget_batch_size=4, per_device_eval_batch_size=3,
            report_to="none", use_cpu=True, disable_tqdm=True, **settings,
        )  # fmt: skip
        return OrthoGradTrainer(
            ViTForImageClassification.from_pretrained(model),
            args,
            train_dataset=retain_rows if retain is None else retain,
            forget_dataset=forget,
        )

    return make


def weights(folder):
    return load_file(Path(folder, "model.safetensors"))


def same(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_requests_are_carried_out_one_after_the_other(history, sets):
    for number in (1, 2):
        history.add(sets[f"forget {number}"], goal="erased", request_id=f"case-{number}")
    assert [request.request_id for request in history.pending()] == ["case-1", "case-2"]
    assert history.model == history.original
    make = maker(sets["retain"])
    report = lambda trainer: evaluate_unlearning(trainer, datasets={"forget": trainer.forget_dataset}, goal="erased")  # noqa: E731
    done = history.run(make, make_report=report)

    assert [request.number for request in done] == [1, 2] and history.pending() == []
    assert history.run(make) == []
    first, second = history.requests
    assert history.model == str(second.model)
    assert not second.run_folder.exists()
    assert (second.private / "unlearning_report.json").exists()
    for request in (first, second):  # each run took its request's loss up
        assert request.measured["after"]["forget_loss"] > request.measured["before"]["forget_loss"]
    forgotten = second.rows("forget").with_format("torch")  # batches of 3 and 1, whose means are no mean over rows
    model = ViTForImageClassification.from_pretrained(second.model)
    losses = PerSampleLoss(model)(model.eval(), {name: forgotten[:][name] for name in ("pixel_values", "labels")})
    assert second.measured["after"]["forget_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)

    records = publishing.load_records(second.model)
    assert [record.request_id for record in records] == ["case-1", "case-2"]
    assert publishing.verify(second.model, salt=second.salt()) == []
    assert records[1].previous == records[0].digest()
    assert [record.goal for record in records] == ["erased", "erased"]
    # nothing of the owner's lies where it could be published
    assert {path.name for path in second.model.iterdir()} <= set(publishing.published_files(second.model))

    checked = history.check(make)
    assert [one.problems for one in checked] == [[], []]
    assert checked[1].came_back == pytest.approx(0, abs=1e-5)
    assert checked[0].came_back != pytest.approx(0, abs=1e-5)  # the second run moved the first request's loss
    assert "came back" in str(checked[0])

    # in new data its rows are found, of the second request too
    new = concatenate_datasets([sets["forget 3"], sets["forget 2"], sets["forget 1"]])
    found = history.check_dataset(new)
    assert sorted((one.row, one.request_id) for one in found) == [(4 + n, f"case-{2 - n // 4}") for n in range(8)]

    # the same without a history
    plain = make(history.original, sets["forget 1"], None, str(history.folder.parent / "plain"))
    plain.train()
    plain.save_model()
    assert same(plain.args.output_dir, first.model)


def test_requests_are_merged_into_one_run(history, sets):
    for number in (1, 2, 3):
        history.add(sets[f"forget {number}"], request_id=f"case-{number}", goal="retrained")
    seen = []

    def make(model, forget, retain, output_dir):
        seen.append(len(forget))
        return maker(sets["retain"])(model, forget, retain, output_dir)

    assert [request.number for request in history.run(make, merge=True)] == [1, 2, 3]
    assert seen == [12]
    carriers = [history.carrier(request).number for request in history.requests]
    assert carriers == [3, 3, 3]
    (record,) = publishing.load_records(history.model)
    assert record.request_id == "case-1, case-2, case-3" and len(record.commitments) == 12
    assert record.goal == "retrained"
    assert [one.problems for one in history.check()] == [[], [], []]
    with pytest.raises(ValueError, match="committed to under the salt of request 3"):
        history.delete_data(1, salt=True)
    history.delete_data(3, salt=True)  # salts of the others' own open nothing but their sketches
    assert [request.salt() for request in history.requests] == [None] * 3
    assert [request.rows("forget") is None for request in history.requests] == [False, False, True]


def test_requests_with_several_goals_are_not_merged(history, sets):
    for number, goal in ((1, "erased"), (2, None)):
        history.add(sets[f"forget {number}"], goal=goal)
    with pytest.raises(ValueError, match="several goals, {1: 'erased', 2: None}, and a run has one"):
        history.run(maker(sets["retain"]), merge=True)
    assert len(history.run(maker(sets["retain"], max_steps=1))) == 2


def test_rows_that_are_asked_for_twice_are_told(history, sets, caplog):
    history.add(sets["forget 1"], request_id="case-1")
    both = concatenate_datasets([sets["forget 2"], sets["forget 1"].select([0, 1])])
    history.add(both, request_id="case-2")
    told = "2 of the 6 rows to forget are also in request 1 (case-1): they are asked for twice."
    assert caplog.text.count(told) == 1
    history.run(maker(sets["retain"], max_steps=1))
    history.delete_data(1)
    history.add(both)  # by the salt
    assert caplog.text.count(told) == 2 and "6 of the 6 rows to forget are also in request 2" in caplog.text
    assert "`make_trainer` has to take both" not in caplog.text
    history.add(sets["forget 3"].add_column("extra", [0] * 4))
    assert "'extra'], those of request 3 have" in caplog.text


def test_a_run_goes_on_with_the_settings_that_it_began_with(history, sets):
    history.add(sets["forget 1"])

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise InterruptedError

    def killed(*arguments):
        trainer = maker(sets["retain"])(*arguments)
        trainer.add_callback(Kill())
        return trainer

    with pytest.raises(InterruptedError):
        history.run(killed)
    fewer = sets["retain"].select(range(6))
    with pytest.raises(
        ValueError, match="learning_rate 0.02, not 0.01; retain rows 6, not 8. Return that one, or `roll"
    ):
        history.run(maker(fewer, learning_rate=2e-2))
    history.run(maker(sets["retain"]))
    kept = history.model
    history.roll_back(0)
    history.run(maker(fewer, learning_rate=2e-2))  # anew
    assert history.model == kept


def test_earlier_requests_are_held(history, sets):
    make = maker(sets["retain"].with_transform(VaryImages()), retain_loss="kl")
    seen = []

    def watched(*arguments):
        seen.append(make(*arguments))
        return seen[-1]

    for number in (1, 2):
        history.add(sets[f"forget {number}"])
    history.run(watched, hold_earlier=True)
    assert [len(trainer.train_dataset) for trainer in seen] == [RETAIN_ROWS, RETAIN_ROWS + 4]
    one, again = seen[1].train_dataset[RETAIN_ROWS], seen[1].train_dataset[RETAIN_ROWS]
    assert not torch.equal(torch.as_tensor(one["pixel_values"]), torch.as_tensor(again["pixel_values"]))  # varied, too
    history.add(sets["forget 3"])
    with pytest.raises(ValueError, match="`hold_earlier` is True, which holds.*'nll' and 0.5"):
        history.run(maker(sets["retain"]), hold_earlier=True)
    history.roll_back(2)

    def with_reference(*arguments):
        trainer = make(*arguments)
        trainer.ref_model = trainer.model
        return trainer

    with pytest.raises(ValueError, match="`hold_earlier` is True, and the trainer has a `ref_model`"):
        history.run(with_reference, hold_earlier=True)
    with pytest.raises(
        ValueError, match=r"`hold_earlier` is True, but rows of earlier requests lack columns.*'extra'"
    ):
        more = sets["retain"].add_column("extra", [0] * RETAIN_ROWS)
        history.run(
            lambda m, f, r, o: maker(more, retain_loss="kl")(m, f.add_column("extra", [0] * 4), r, o),
            hold_earlier=True,
        )
    history.delete_data(1)
    with pytest.raises(ValueError, match=r"rows of requests \[1\] were deleted"):
        history.run(make, hold_earlier=True)
    assert [request.number for request in history.run(make)] == [3]  # as the message says


def test_a_roll_back_makes_later_requests_pending(history, sets):
    for number in (1, 2, 3):
        history.add(sets[f"forget {number}"])
    make = maker(sets["retain"])
    history.run(make)
    last = weights(history.model)
    with pytest.raises(ValueError, match="`number` is 7, but models are kept after \\[1, 2, 3\\]"):
        history.roll_back(7)
    assert [request.number for request in history.roll_back(1)] == [2, 3]
    assert history.model == str(history.requests[0].model)
    assert [one.number for one in history.check()] == [1]
    history.run(make)  # ends where it ended
    assert all(torch.equal(value, last[name]) for name, value in weights(history.model).items())
    shutil.rmtree(history.requests[1].model)  # an older model may go
    assert history.pending() == [] and history.run(make) == []
    with pytest.raises(ValueError, match="models are kept after \\[1, 3\\]"):
        history.roll_back(2)
    assert [request.number for request in history.roll_back(0)] == [1, 2, 3]
    assert history.model == history.original
    history.withdraw(2)
    assert [request.number for request in history.run(make)] == [1, 3]
    with pytest.raises(ValueError, match="`number` is 3, but its run has begun"):
        history.withdraw(3)
    history.delete_data(3)
    with pytest.raises(ValueError, match=r"rows or salts of requests \[3\] were deleted"):
        history.roll_back(1)


def test_what_was_changed_is_found(history, sets):
    for number in (1, 2):
        history.add(sets[f"forget {number}"], request_id=f"case-{number}")
    make = maker(sets["retain"])
    history.run(make)
    path = Path(history.model, publishing.files.RECORD_NAME)
    content = json.loads(path.read_text())
    content["records"][0]["commitments"].pop()
    path.write_text(json.dumps(content))
    found = history.check()
    assert "the chain is broken" in found[0].problems[0]
    assert {"its record does not carry the seal of its salt", "1 of its 4 rows are in no commitment"} < set(
        found[0].problems
    )
    history.add(sets["forget 3"])
    with pytest.raises(ValueError, match="The model to start from.*is not as it was recorded: the chain is broken"):
        history.run(make)
    (history.requests[0].private / "forget.0.removed").mkdir()  # by a deletion that was killed
    # without rows and salt there is less to check
    history.delete_data(1, salt=True)
    assert len(history.check()[0].problems) == 1
    assert history.requests[0].rows("forget") is None and history.requests[0].salt() is None
    assert not list(history.folder.rglob("*.removed"))
    shutil.rmtree(history.requests[0].folder)
    assert str(history.check()[0]).startswith("request 1 (case-1): its folder is gone")


def test_what_is_not_looked_for_is_said(history, sets, caplog):
    for number in (1, 2):
        history.add(sets[f"forget {number}"], request_id=f"case-{number}")
    history.run(maker(sets["retain"]), merge=True)
    again = RequestHistory.create(history.folder.with_name("again"), history.model)
    assert again.check() == []  # records from before it are none of its requests
    assert history.check_dataset(sets["forget 3"], column=["a", "b", "c", "d"]) == []
    assert caplog.text.count("it has no sketches") == 2
    for number in (1, 2):  # by rows that are kept
        assert len(history.check_dataset(sets[f"forget {number}"].remove_columns("labels"))) == 4
    assert "have no `labels`" in caplog.text
    history.delete_data(2, salt=True)
    assert history.check_dataset(sets["forget 2"]) == []
    assert "Request 2 is not looked for: its rows and its salt were deleted." in caplog.text
    with pytest.raises(ValueError, match="`dataset` has none of the columns .* of request 'case-1', only labels"):
        history.check_dataset(sets["forget 1"].remove_columns("pixel_values"))
    shutil.rmtree(history.request(1).folder)
    history.check_dataset(sets["forget 1"])
    assert "Request 1 (case-1) is not looked for: its folder is gone" in caplog.text


def test_requests_are_carried_out_by_one_process(history, sets):
    history.add(sets["forget 1"])
    with FileLock(history.folder / ".lock"):
        with pytest.raises(ValueError, match="Another process carries out requests of '.*history': it holds .*lock"):
            history.run(maker(sets["retain"]))
    assert len(history.run(maker(sets["retain"], max_steps=1))) == 1


def test_nothing_is_left_of_a_request_that_was_refused(history, sets):
    with pytest.raises(ValueError, match="neither text, tokens nor audio"):
        history.add(sets["forget 1"], sketch=[None] * 4)
    assert [path.name for path in (history.folder / "requests").iterdir()] == []


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_history_that_is_killed_goes_on_bit_for_bit(kills, tmp_path):
    """At random moments of five requests: while it is begun, added to, trained, saved and published."""
    command = [sys.executable, str(TESTS / "killed_requests.py"), str(tmp_path / "trials"), "7", str(kills)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == kills and all(one["resumed"] == 0 and one["same"] for one in results), results


BAD = {
    "no rows": (lambda history, rows: history.add(rows.select([])), "`forget_dataset` is empty"),
    "a list": (
        lambda history, rows: history.add([1]),
        "`forget_dataset` is a list, but is kept as files: pass a datas",
    ),
    "goal": (
        lambda history, rows: history.add(rows, goal="gone"),
        "`goal` must be 'retrained' or 'erased', or left out, but is 'gone'",
    ),
    "comma": (
        lambda history, rows: history.add(rows, request_id="March, first"),
        "`request_id` is 'March, first', but a comma",
    ),
    "transform": (
        lambda history, rows: history.add(rows.with_transform(VaryImages())),
        "`forget_dataset` has a transform, which no file keeps",
    ),
    "no such request": (
        lambda history, rows: history.withdraw(4),
        "`number` is 4, but the history has requests \\[\\]",
    ),
    "name": (
        lambda history, rows: [history.add(rows, request_id="a") for _ in range(2)],
        "`request_id` 'a' is that of an earlier request",
    ),
    "folder": (
        lambda history, rows: RequestHistory(history.folder / "requests"),
        "holds no history.json: `RequestHistory.create",
    ),
    "created twice": (
        lambda history, rows: RequestHistory.create(history.folder, history.original),
        "is not empty. Name a new one for the history",
    ),
    "no weights": (
        lambda history, rows: RequestHistory.create(history.folder / "new", history.folder),
        "holds no weights in safetensors",
    ),
    "no such model": (
        lambda history, rows: RequestHistory.create(history.folder / "new", "nobody/nothing"),
        "`model` is 'nobody/nothing', but there is no such folder, nor such a model",
    ),
    "other rows": (
        lambda history, rows: (
            history.add(rows),
            history.run(lambda m, f, r, o: maker(rows, check_overlap=False)(m, f.select([0]), r, o)),
        ),
        "a trainer that forgets 1 rows, but the request has 4. Pass it `forget`",
    ),
    "other folder": (
        lambda history, rows: (
            history.add(rows),
            history.run(lambda m, f, r, o: maker(rows, check_overlap=False)(m, f, r, f"{o}x")),
        ),
        "whose `output_dir` is .*runx', not the one that it was given",
    ),
    "pending data": (
        lambda history, rows: (history.add(rows), history.delete_data(1)),
        "`number` is 1, which is no request that was carried out",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(history, sets, name):
    act, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        act(history, Dataset.from_dict(sets["forget 1"].with_format(None).to_dict()).with_format("torch"))
