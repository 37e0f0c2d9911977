"""What a history of requests tells, finds and refuses."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, concatenate_datasets
from histories import maker
from huggingface_hub import HfApi
from published import rows

from hf_orthograd import publishing
from hf_orthograd.commands import run
from hf_orthograd.data import VaryImages
from hf_orthograd.gradients import UnsupportedModelError
from hf_orthograd.requests import RequestHistory, duplicates
from hf_orthograd.requests.duplicates import same_rows
from hf_orthograd.validation import row_digests, stored_row


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
    assert caplog.text.count("2 of the 6 rows to forget are also in request case-1: they are asked for twice.") == 1
    history.run(maker(sets["retain"], max_steps=1), merge=True)
    for number in (1, 2):
        history.delete_data(number)
    history.add(both.add_column("extra", [0] * 6))  # by the salt of both
    assert "6 of the 6 rows to forget are also in request case-1, case-2: they" in caplog.text
    history.withdraw(3)
    history.add(both)
    history.add(sets["forget 3"].add_column("extra", [0] * 4))
    assert "'extra'], those of request 3 have" in caplog.text


def test_what_a_run_brings_back_is_told(history, sets, caplog):
    history.add(sets["forget 1"], request_id="case-1")
    history.run(maker(sets["retain"]))
    assert "brought back" not in caplog.text and "rows to retain" not in caplog.text
    history.add(sets["forget 2"], request_id="case-2")
    taught = concatenate_datasets([sets["retain"], sets["forget 1"]])
    history.run(maker(taught, max_steps=20, alpha=0.9, per_device_train_batch_size=12))
    assert "4 of the 12 rows to retain were forgotten by request case-1: the run may teach them again" in caplog.text
    assert "The run brought back what request 1 (case-1) asked to forget: the loss on its rows was" in caplog.text
    # rows that the trainer may not take are left to `check`: the run must not end after all its steps
    history.add(sets["forget 3"].add_column("extra", [0] * 4))
    history.run(maker(sets["retain"].add_column("extra", [0] * 8), max_steps=1))
    assert caplog.text.count("asked to forget is not measured: its rows have the columns") == 2


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
    with pytest.raises(ValueError, match="The model to start from.*is not as recorded: the chain is broken"):
        history.run(make)
    (history.requests[0].private / "forget.0.removed").mkdir()  # by a deletion that was killed
    # without rows and salt there is less to check
    history.delete_data(1, salt=True)
    assert len(history.check()[0].problems) == 1
    assert history.requests[0].rows("forget") is None and history.requests[0].salt() is None
    assert not list(history.folder.rglob("*.removed"))
    shutil.rmtree(history.requests[0].folder)
    assert str(history.check()[0]).startswith("request 1 (case-1): its folder is gone")


@pytest.mark.parametrize("error", [UnsupportedModelError("no."), FloatingPointError("At step 3.")])
def test_an_error_names_the_request_and_stays_of_its_kind(history, sets, error):
    history.add(sets["forget 1"], request_id="case-1")

    def make(*given):
        raise error

    with pytest.raises(type(error), match=rf"^Not carried out: 1 \(case-1\)\. {error}"):
        history.run(make)


def test_new_rows_are_hashed_once_for_all_requests(history, sets, monkeypatch):
    hashed = []

    def counted(dataset, columns):
        hashed.append(len(dataset))
        return row_digests(dataset, columns)

    monkeypatch.setattr(duplicates, "row_digests", counted)
    for number in (1, 2, 3):
        history.add(sets[f"forget {number}"])
        history.run(maker(sets["retain"], max_steps=1))
    hashed.clear()
    assert history.check_dataset(sets["retain"]) == []
    assert hashed.count(len(sets["retain"])) == 1  # by the records
    history.roll_back(1)
    hashed.clear()
    assert history.check_dataset(sets["retain"]) == []
    assert hashed.count(len(sets["retain"])) == 2  # and for the rows of those that are pending


def test_what_is_not_looked_for_is_said(history, sets, caplog, capsys):
    for number in (1, 2):
        history.add(sets[f"forget {number}"], request_id=f"case-{number}")
    history.run(maker(sets["retain"]), merge=True)
    assert run(["requests", "status", str(history.folder)]) == 0
    assert "1 case-1: done with request 2, under its salt; 4 rows; kept: rows, salt\n" in capsys.readouterr().out
    again = RequestHistory.create(history.folder.with_name("again"), history.model)
    assert again.check() == []  # records from before it are none of its requests
    assert history.check_dataset(sets["forget 3"], column=["a", "b", "c", "d"]) == []
    assert caplog.text.count("it has no sketches") == 2
    history.add(sets["forget 3"], sketch=[[1, 2, 3]] * 4)
    assert len(history.check_dataset(sets["retain"].take(1), column=[[1, 2, 3]])) == 1
    assert history.check_dataset(sets["retain"].take(1), column=["a"]) == []
    assert "of request 3 are not looked for: its sketches are of tokens, and `column` is text: pass" in caplog.text
    history.withdraw(3)
    for number in (1, 2):  # by rows that are kept
        assert len(history.check_dataset(sets[f"forget {number}"].remove_columns("labels"))) == 4
    assert "have no `labels`" in caplog.text
    history.delete_data(2, salt=True)
    assert history.check_dataset(sets["forget 2"]) == []
    assert "Request 2 is not looked for: its rows were deleted, and no salt opens its record." in caplog.text
    with pytest.raises(ValueError, match="`dataset` has none of the columns .* of request 'case-1', only labels"):
        history.check_dataset(sets["forget 1"].remove_columns("pixel_values"))
    shutil.rmtree(history.request(1).folder)
    history.check_dataset(sets["forget 1"])
    assert "Request 1 (case-1) is not looked for: its folder is gone" in caplog.text


def test_nothing_is_left_of_a_request_that_was_refused(history, sets):
    with pytest.raises(ValueError, match="neither text, tokens nor audio"):
        history.add(sets["forget 1"], sketch=[None] * 4)
    assert [path.name for path in (history.folder / "requests").iterdir()] == []


def test_labels_count_by_any_name(history, sets):
    """As Trainer's own collators take them: "label" and "label_ids" are renamed."""
    own = {name: rows.rename_column("labels", "label") for name, rows in sets.items()}
    history.add(own["forget 1"], request_id="case-1")
    history.run(maker(own["retain"], max_steps=1))
    wrong = own["forget 1"].with_format(None).map(lambda row: {"label": 1 - row["label"]})
    salt = history.requests[0].salt()
    (record,) = publishing.load_records(history.model)
    for deleted in (False, True):
        if deleted:
            history.delete_data(1)
        for name in ("label", "labels", "label_ids"):
            same = own["forget 1"].rename_column("label", name) if name != "label" else own["forget 1"]
            other = wrong.rename_column("label", name) if name != "label" else wrong
            assert len(history.check_dataset(same)) == 4 and history.check_dataset(other) == []
            assert record.includes(stored_row(same, 0), salt) and not record.includes(stored_row(other, 0), salt)
    with pytest.raises(ValueError, match="no column pixel_values"):
        history.check_dataset(wrong.select_columns(["label"]))
    two = own["forget 2"].add_column("labels", [0] * 4)  # with two names "labels" counts
    assert len(same_rows(two, two.remove_columns("label"), "case-2", {})) == 4
    with pytest.raises(ValueError, match="`dataset` has none of the columns"):
        same_rows(two.rename_column("pixel_values", "input_values"), two, "case-2", {})


def test_nothing_is_deleted_for_a_model_that_is_gone(history, sets):
    for number in (1, 2):
        history.add(sets[f"forget {number}"])
    history.run(maker(sets["retain"], max_steps=1))
    first, last = history.requests
    kept = (first.model / "model.safetensors").read_bytes()
    (first.model / "model.safetensors").write_bytes(kept[:-4])
    assert "the model that its run left is not as recorded" in history.check()[0].problems[0]
    with pytest.raises(ValueError, match="`number` is 1, but its model is not as recorded"):
        history.roll_back(1)
    shutil.rmtree(history.original)
    with pytest.raises(ValueError, match="`number` is 0, but the original was deleted"):
        history.roll_back(0)
    assert last.model.exists()
    history.delete_data(2, salt=True)
    assert "not checked, as it was deleted: its seal, its commitments" in str(history.check()[1])


def test_a_history_begins_with_a_model_of_the_hub(folder, make_samples, tmp_path, caplog):
    publishing.publish(folder, "me/name")
    history = RequestHistory.create(tmp_path / "history", "me/name")
    assert history.original == history.model == "me/name"
    assert history.records_before == 1  # it was unlearned before
    history.add(rows(make_samples("vit", 4)), request_id="case-1")
    history.run(maker(rows(make_samples("vit", 8, seed=9)), max_steps=1))
    assert len(publishing.load_records(history.model)) == 2
    assert [(one.number, one.problems) for one in history.check()] == [(1, [])]
    assert "when this history began" not in caplog.text
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="other.json", repo_id="me/name")
    history.roll_back(0)
    history.run(maker(rows(make_samples("vit", 8, seed=9)), max_steps=1))
    assert "The original, 'me/name', was at commit" in caplog.text and "when this history began" in caplog.text


class Reported:
    goal = "retrained"


BAD = {
    "no rows": (lambda history, rows: history.add(rows.select([])), "`forget_dataset` is empty"),
    "a list": (
        lambda history, rows: history.add([1]),
        "`forget_dataset` is a list, but is kept as files: pass a datas",
    ),
    "goal": (
        lambda history, rows: history.add(rows, goal="gone"),
        "`goal` must be 'retrained' or 'erased', or left out",
    ),
    "comma": (lambda history, rows: history.add(rows, request_id="a, b"), "`request_id` is 'a, b', but a comma"),
    "transform": (
        lambda history, rows: history.add(rows.with_transform(VaryImages())),
        "`forget_dataset` has a transform, which no file keeps",
    ),
    "no such request": (
        lambda history, rows: history.withdraw(4),
        r"`number` is 4, but the history has requests \[\]",
    ),
    "name": (
        lambda history, rows: [history.add(rows, request_id="a") for _ in range(2)],
        "`request_id` 'a' is that of an earlier request",
    ),
    "folder": (
        lambda history, rows: RequestHistory(history.folder / "requests"),
        "holds no history.json: `RequestHistory",
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
        "`model` is 'nobody/nothing', which is no folder, and was not found on the Hub: .* Pass a folder, or",
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
        r"Not carried out: 1 \(.*\)\. `make_trainer`.* whose `output_dir` is .*runx', not the one that it was given",
    ),
    "arguments of a report": (
        lambda history, rows: (history.add(rows), history.run(maker(rows), make_report=lambda trainer: None)),
        "`make_report` must take the trainer and the goal, but: too many positional arguments",
    ),
    "goal of a report": (
        lambda history, rows: (
            history.add(rows, goal="erased"),
            history.run(maker(rows, max_steps=1, check_overlap=False), make_report=lambda trainer, goal: Reported()),
        ),
        "`make_report` returned a report with the goal 'retrained', but that of the request is 'erased': pass `goal`",
    ),
    "sketch": (
        lambda history, rows: history.add(rows, sketch=["a text"]),
        "`sketch` has 1 values, but `forget_dataset` has 4 rows",
    ),
    "no runs": (lambda history, rows: history.run(maker(rows), at_most=0), "`at_most` must be 1 or more"),
    "sketch by name": (
        lambda history, rows: history.add(rows, sketch="text"),
        "`sketch` is 'text', but takes the values of a column: pass `dataset",
    ),
    "column by name": (
        lambda history, rows: history.check_dataset(rows, column="text"),
        "`column` is 'text', but takes the values of a column",
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
