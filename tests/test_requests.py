"""A model's history of requests: what is carried out and taken back, and what a kill leaves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import concatenate_datasets
from filelock import FileLock
from histories import maker, same, weights
from launched_requests import go_through
from processes import run_in_processes
from transformers import TrainerCallback, ViTForImageClassification

from hf_orthograd import publishing
from hf_orthograd.data import VaryImages
from hf_orthograd.evaluation import evaluate_unlearning
from hf_orthograd.objectives import PerSampleLoss
from hf_orthograd.requests import RequestHistory


RETAIN_ROWS = 8
TESTS = Path(__file__).parent


def test_requests_are_carried_out_one_after_the_other(history, sets):
    for number in (1, 2):
        history.add(sets[f"forget {number}"], goal="erased", request_id=f"case-{number}")
    assert [request.request_id for request in history.pending()] == ["case-1", "case-2"]
    assert history.model == history.original
    make = maker(sets["retain"])
    report = lambda trainer, goal: evaluate_unlearning(trainer, datasets={"forget": trainer.forget_dataset}, goal=goal)  # noqa: E731
    told = []
    (first,) = history.run(make, make_report=report, at_most=1, on_done=told.append)
    assert [[request.number for request in requests] for requests in told] == [[1]]
    assert first.number == 1 and [request.request_id for request in history.pending()] == ["case-2"]
    assert [request.number for request in history.run(make, make_report=report)] == [2] and history.pending() == []
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
    new = concatenate_datasets([sets["forget 2"], sets["forget 3"]])
    named = ["case-2"] * 4 + ["case-3"] * 4
    assert [(one.row, one.request_id) for one in history.check_dataset(new)] == list(enumerate(named))
    shutil.rmtree(history.requests[2].private / "forget")  # of those rows the record alone tells
    named = ["case-2"] * 4 + ["case-1, case-2, case-3"] * 4
    assert [(one.row, one.request_id) for one in history.check_dataset(new)] == list(enumerate(named))
    with pytest.raises(ValueError, match="committed to under the salt of request 3"):
        history.delete_data(1, salt=True)
    history.delete_data(3, salt=True)  # salts of the others' own open nothing but their sketches
    assert [request.salt() for request in history.requests] == [None] * 3
    assert [request.rows("forget") is None for request in history.requests] == [False, False, True]


def test_a_run_goes_on_with_the_settings_that_it_began_with(history, sets):
    history.add(sets["forget 1"])
    steps = []

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)
            if steps == [1, 2]:
                raise InterruptedError

    def watched(rows=sets["retain"], **config):
        def make(*arguments):
            trainer = maker(rows, **config)(*arguments)
            trainer.add_callback(Kill())
            return trainer

        return make

    with pytest.raises(InterruptedError):
        history.run(watched())
    other = watched(sets["retain"].select(range(6)), learning_rate=2e-2)
    with pytest.raises(
        ValueError, match="learning_rate 0.02, not 0.01; retain rows 6, not 8. Return that one, or `roll"
    ):
        history.run(other)
    with pytest.raises(ValueError, match="another trainer than the run began with: digest of retain rows"):
        history.run(watched(sets["retain"].select(range(7, -1, -1))))
    # where files lie and what is shown makes no other weights
    history = RequestHistory(history.folder.rename(history.folder.with_name("moved")))
    history.run(watched(logging_steps=1, save_total_limit=2))
    assert steps == [1, 2, 2, 3]  # goes on from the checkpoint of step 1
    resumed = weights(history.model)
    history.roll_back(0)
    assert not (history.requests[0].private / "measured.json").exists()  # of a model that is gone
    history.run(watched())
    assert all(torch.equal(value, resumed[name]) for name, value in weights(history.model).items())
    history.roll_back(0)
    history.run(other)
    assert not all(torch.equal(value, resumed[name]) for name, value in weights(history.model).items())


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
    shutil.rmtree(history.requests[2].model)  # as a roll back that was killed leaves it
    assert [request.number for request in history.roll_back(1)] == [2, 3]
    assert history.model == str(history.requests[0].model)
    assert [one.number for one in history.check()] == [1]
    history.run(make)  # ends where it ended
    assert all(torch.equal(value, last[name]) for name, value in weights(history.model).items())
    shutil.rmtree(history.requests[1].model)  # an older model may go
    assert history.pending() == [] and history.run(make) == []
    with pytest.raises(ValueError, match="models are kept after \\[1, 3\\]"):
        history.roll_back(2)
    history.add(sets["forget 1"].take(2), request_id="case-4")
    with pytest.raises(ValueError, match=r"^Not carried out: 4 \(case-4\)\. `make_trainer` returned"):
        history.run(lambda *given: make(*given[:3], given[3] + "x"))
    # the fourth came to nothing: it is not pending again
    assert [request.number for request in history.roll_back(0)] == [1, 2, 3]
    history.withdraw(4)
    assert history.model == history.original
    history.withdraw(2)
    assert [request.number for request in history.run(make)] == [1, 3]
    with pytest.raises(ValueError, match="`number` is 3, but it was carried out"):
        history.withdraw(3)
    history.delete_data(3)
    with pytest.raises(ValueError, match=r"rows or salts of requests \[3\] were deleted"):
        history.roll_back(1)


def test_a_launch_changes_a_history_once(make_model, tmp_path):
    """Every process calls everything; the first one writes, and all are told the same."""
    make_model("vit").save_pretrained(tmp_path / "original")
    run_in_processes(2, tmp_path, go_through, tmp_path)
    first, second = (json.loads((tmp_path / f"{process}.json").read_text()) for process in (0, 1))
    refused, same = first.pop("refused"), {name: value for name, value in second.items() if name != "refused"}
    assert first == same
    assert first == {"added": [1, 2, 3], "done": [1, 2], "undone": [2], "again": [2], "problems": [[], []]}
    assert "`number` is 7, but the history has requests [1, 2]" in refused[0] and "is not empty" in refused[1]
    assert second["refused"] == [f"The first process failed: ValueError: {message}" for message in refused]


def test_requests_are_carried_out_by_one_process(history, sets):
    history.add(sets["forget 1"])
    with FileLock(history.folder / ".lock"):
        with pytest.raises(
            ValueError, match="Another process carries out or changes requests of '.*history': it holds .*lock"
        ):
            history.run(maker(sets["retain"]))
        with pytest.raises(ValueError, match="Another process carries out or changes requests"):
            history.withdraw(1)
        history.add(sets["forget 2"])  # a new request may come in at any time
    assert len(history.run(maker(sets["retain"], max_steps=1))) == 2


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_history_that_is_killed_goes_on_bit_for_bit(kills, tmp_path):
    """At random moments of five requests: while it is begun, added to, trained, saved and published."""
    command = [sys.executable, str(TESTS / "killed_requests.py"), str(tmp_path / "trials"), "7", str(kills)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == kills and all(one["resumed"] == 0 and one["same"] for one in results), results
