"""The record of a request: what it says, what is found that differs from it, and the chain of requests."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Image
from hub_server import Fault
from peft import LoraConfig, get_peft_model
from published import REPO, rows
from transformers import (
    AutoModelForImageClassification,
)

from hf_orthograd.baselines import ScrubTrainer
from hf_orthograd.publishing import load_records, publish, read_salt, verify
from hf_orthograd.publishing.files import remove_paths
from hf_orthograd.publishing.record import hashes_of
from hf_orthograd.validation import row_digest, row_digests, stored_row


def test_paths_in_parts_of_a_configuration_go(tmp_path):
    """Composite models keep one for each part."""
    parts = {
        "_name_or_path": str(tmp_path),
        "encoder": {"_name_or_path": str(tmp_path / "ann")},
        "layers": [{"name_or_path": "a/b/c"}],
    }
    (tmp_path / "config.json").write_text(json.dumps(parts))
    remove_paths(tmp_path, "owner/base")
    found = json.loads((tmp_path / "config.json").read_text())
    assert (
        found["encoder"]["_name_or_path"]
        == found["layers"][0]["name_or_path"]
        == found["_name_or_path"]
        == "owner/base"
    )


def test_parameters_are_those_of_the_merged_model(unlearned, tmp_path):
    def wrap(model):
        config = LoraConfig(r=2, target_modules=["query", "q_proj"], modules_to_save=["classifier"])
        return get_peft_model(model, config)

    trainer = unlearned(wrap=wrap, push_to_hub=False)
    trainer.create_model_card()
    (record,) = load_records(tmp_path / "out" / "public")
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "public")
    assert record.parameters == merged.num_parameters()


def test_what_was_done_elsewhere_is_not_made_up(unlearned, tmp_path):
    trainer = unlearned(push_to_hub=False)
    trainer.state.global_step = 0  # as of a trainer that only publishes
    trainer.create_model_card()
    (record,) = load_records(tmp_path / "out" / "public")
    assert (
        record.training["steps"] is record.training["processes"] is record.training["retain_samples_per_step"] is None
    )
    assert "| steps | not known |" in (tmp_path / "out" / "public" / "README.md").read_text()


def test_samples_of_a_step_are_counted_over_micro_batches(unlearned, tmp_path):
    trainer = unlearned(push_to_hub=False, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.create_model_card()
    (record,) = load_records(tmp_path / "out" / "public")
    assert record.training["retain_samples_per_step"] == 4
    assert "| retain samples protected in a step | 4 |" in (tmp_path / "out" / "public" / "README.md").read_text()


def test_the_card_of_a_baseline_shows_no_settings_that_it_does_not_read(unlearned, tmp_path):
    trainer = unlearned(push_to_hub=False, trainer_class=ScrubTrainer)
    trainer.create_model_card()
    lines = (tmp_path / "out" / "public" / "README.md").read_text().splitlines()
    assert "| method | ScrubTrainer |" in lines and "| retain samples in a step | 4 |" in lines
    assert not any("`alpha=" in line or "`projection=" in line for line in lines)


def test_untouched_folder_passes_and_each_change_is_named(folder, tmp_path):
    assert verify(folder) == []

    def changed(name, change):
        path = folder / name
        before = path.read_bytes()
        path.write_bytes(change(before))
        problems = verify(folder)
        path.write_bytes(before)
        return problems

    flipped = changed("model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    assert flipped == ["model.safetensors is not the file that was recorded"]
    (edited,) = changed("unlearning_report.md", lambda data: data.replace(b"0", b"1"))
    assert edited == "unlearning_report.md does not say what unlearning_report.json says"
    edited = changed("unlearning_report.json", lambda data: data.replace(b"0.", b"1."))
    assert edited[0] == "unlearning_report.json is not the file that was recorded"
    (edited,) = changed("config.json", lambda data: data.replace(b"gelu", b"relu"))
    assert edited == "config.json is not the file that was recorded"
    # whatever may be loaded instead
    for name in ("adapter_model.safetensors", "adapter_config.json", "pytorch_model.bin", "own.py", "sub/model.pt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
        assert verify(folder) == [f"{name} stands in no record"]
        (folder / name).unlink()
    (folder / "model.safetensors").unlink()
    assert verify(folder) == ["model.safetensors is missing"]


def test_record_that_was_changed_with_the_weights_is_found_by_the_salt(folder):
    """Without the salt, or a signature, it is not."""
    salt = read_salt(folder.parent / "_unlearning_salt.key")
    (folder / "model.safetensors").write_bytes(b"other")
    content = json.loads((folder / "unlearning_record.json").read_text())
    content["records"][0]["weights"] = hashes_of(folder, ["model.safetensors"])
    (folder / "unlearning_record.json").write_text(json.dumps(content))
    assert verify(folder) == []
    assert verify(folder, salt=salt) == [
        "no record carries the seal of this salt: it was changed, or the salt is another"
    ]


def test_published_folder_that_was_changed_is_not_pushed(hub, folder):
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(
        ValueError, match="is not as it was recorded: model.safetensors is not the file.* Nothing was pushed"
    ):
        publish(folder, REPO)
    assert not hub.repositories


def test_rows_of_the_request_are_proved_and_no_others(folder, make_samples):
    salt = read_salt(folder.parent / "_unlearning_salt.key")
    forget, retain = rows(make_samples("vit", 4, seed=1)), rows(make_samples("vit", 4, seed=2))
    assert verify(folder, salt=salt, row=forget[2]) == verify(folder, salt=salt) == []
    assert verify(folder, salt=salt, row=retain[0]) == ["the row is in no request under this salt"]
    no_seal = "no record carries the seal of this salt: it was changed, or the salt is another"
    assert verify(folder, salt=bytes(32), row=forget[2]) == [no_seal, "the row is in no request under this salt"]
    with pytest.raises(ValueError, match="`row` has no column pixel_values, by which request"):
        verify(folder, salt=salt, row={"image": 1})
    with pytest.raises(ValueError, match="nosalt.key' holds no salt: .*No such file"):
        read_salt(folder / "nosalt.key")
    with pytest.raises(ValueError, match="pass `salt`, too"):
        verify(folder, row=forget[2])
    (record,) = load_records(folder)
    assert len(set(record.commitments)) == 4 and record.commitments == sorted(record.commitments)


def test_requests_make_a_chain(hub, unlearned, tmp_path):
    first = unlearned(push_to_hub=False)
    first.create_model_card()
    source = (tmp_path / "out" / "public").rename(tmp_path / "first")
    second = unlearned(push_to_hub=False, wrap=lambda model: AutoModelForImageClassification.from_pretrained(source))
    second.create_model_card()
    folder = tmp_path / "out" / "public"
    older, newer = load_records(folder)
    assert newer.previous == older.digest() and older.previous is None
    assert newer.weights_before == older.weights and newer.weights != older.weights
    assert verify(folder) == []
    assert "Earlier request" in (folder / "README.md").read_text()
    content = json.loads((folder / "unlearning_record.json").read_text())
    for records in (content["records"][1:], [{**content["records"][0], "goal": "erased"}, content["records"][1]]):
        (folder / "unlearning_record.json").write_text(json.dumps({"records": records}))
        (problem,) = verify(folder)
        assert problem.startswith("the chain is broken before request") and newer.request_id in problem
    (folder / "unlearning_record.json").write_text(json.dumps({"records": content["records"][:1]}))
    assert verify(folder) == ["model.safetensors is not the file that was recorded"]


def test_chain_goes_on_from_what_a_run_wrote_and_from_the_hub(hub, unlearned, tmp_path, caplog, monkeypatch):
    repo_id = "owner/chained"
    first = unlearned(hub_model_id=repo_id)
    first.save_model()
    first.push_to_hub()
    output, public = tmp_path / "out", tmp_path / "out" / "public"
    (oldest,) = load_records(public)

    def records_after(source):
        load = AutoModelForImageClassification.from_pretrained
        trainer = unlearned(wrap=lambda model: load(source), push_to_hub=False)
        trainer.create_model_card()
        return load_records(public)

    def records_after_saving_over(source):
        """As the examples do: the folder that the model came from holds the new weights before the record is made."""
        load = AutoModelForImageClassification.from_pretrained
        trainer = unlearned(wrap=lambda model: load(source), push_to_hub=False)
        trainer.save_model()
        trainer.create_model_card()
        trainer.create_model_card()  # published twice, it is one request
        return load_records(public)

    shutil.copytree(output, tmp_path / "kept")
    one, two = records_after_saving_over(output)
    assert one == oldest and two.previous == oldest.digest() and two.weights_before == oldest.weights != two.weights
    shutil.rmtree(output)
    shutil.copytree(tmp_path / "kept", output)
    one, two = records_after(output)
    assert one == oldest and two.previous == oldest.digest() and two.weights_before == oldest.weights
    # the folder that is to be replaced is read first
    assert [record.previous for record in records_after(public)] == [None, oldest.digest(), two.digest()]
    assert verify(public, salt=read_salt(output / "_unlearning_salt.key")) == []
    assert "is of other weights" not in caplog.text
    (unrelated,) = records_after(output)
    assert unrelated.previous is None and "is of other weights than those there" in caplog.text
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults.append(Fault("HEAD", "unlearning_record.json", 503, 2))  # it passes: the chain is not cut
    one, two = records_after(repo_id)
    assert hub.faults.pop().times == 0
    assert one == oldest and two.previous == oldest.digest() and two.weights_before == oldest.weights
    assert two.base_model == repo_id and two.base_revision == hub.repositories[repo_id].branches["main"]
    hub.repositories[repo_id].commits[two.base_revision].files.pop("unlearning_record.json")  # as of any model there
    shutil.rmtree(Path(huggingface_hub.constants.HF_HUB_CACHE, "models--owner--chained"))
    (record,) = records_after(repo_id)
    assert record.previous is None and record.weights_before == oldest.weights
    hub.repositories[repo_id].add("main", "more", {"config.json": b"{}", "model.safetensors": b""}, two.base_revision)
    huggingface_hub.snapshot_download(repo_id)
    trainer = unlearned(push_to_hub=False)
    trainer.model.config._name_or_path = repo_id
    trainer.create_model_card()
    assert load_records(public)[-1].base_revision is None and "Several revisions of owner/chained" in caplog.text


def test_nothing_saved_nothing_replaced(hub, unlearned, tmp_path):
    """As where FSDP saves a model in parts, which `save_model` writes nowhere."""
    trainer = unlearned()
    trainer.create_model_card()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "public").iterdir()}
    trainer.save_model = lambda folder: None
    with pytest.raises(ValueError, match="saved no weights .* FULL_STATE_DICT"):
        trainer.push_to_hub()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "public").iterdir()} == before
    assert not hub.repositories[REPO].reachable().get("model.safetensors")


def test_picture_is_proved_wherever_it_lies(tmp_path):
    """A stored image is bytes, or a path to a file: both are the same row."""
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    PIL.Image.fromarray(pixels).save(tmp_path / "one.png")
    content = {"bytes": (tmp_path / "one.png").read_bytes(), "path": None}
    pictures = [{"bytes": None, "path": str(tmp_path / "one.png")}, content, {**content, "path": "elsewhere.png"}]
    dataset = Dataset.from_dict({"image": pictures, "labels": [1, 1, 2]}).cast_column("image", Image())
    first, second, third = row_digests(dataset, None)
    assert first == second != third
    dataset.set_transform(lambda batch: {"pixel_values": [np.asarray(one) for one in batch["image"]]})
    assert row_digest(stored_row(dataset, 0), None) == first == row_digests(dataset, None)[0]
