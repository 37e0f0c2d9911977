"""Publishing, over HTTP by the real client: what arrives, what never does, and what is left when something fails."""

import json
import logging
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Image
from hub_server import Fault, Repository
from huggingface_hub import ModelCard
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSpeechSeq2Seq,
    ViTImageProcessor,
)

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.evaluation import Quantization, Relearning, UnlearningReport, evaluate_unlearning
from hf_orthograd.publishing import CardOptions, load_records, publish, read_salt, retract, verify, write_card
from hf_orthograd.publishing.commands import run
from hf_orthograd.publishing.files import remove_paths
from hf_orthograd.publishing.record import hashes_of
from hf_orthograd.validation import row_digest, row_digests, stored_row


REPO = "owner/unlearned"
CLASSES = {
    "whisper": AutoModelForSpeechSeq2Seq,
    "vit": AutoModelForImageClassification,
    "llama": AutoModelForCausalLM,
}


def rows(samples, **columns):
    """As a data set, with further columns that say whose the rows are."""
    examples = [samples[index] for index in range(len(samples))]
    content = {name: [np.asarray(example[name]).tolist() for example in examples] for name in examples[0]}
    return Dataset.from_dict(content | columns).with_format("torch", columns=list(content), output_all_columns=True)


@pytest.fixture
def unlearned(make_model, make_samples, tmp_path):
    """A trainer that has made one step, and its report."""

    def make(name="vit", *, wrap=lambda model: model, **config):
        settings = {"hub_strategy": "end", "hub_model_id": REPO, "push_to_hub": True, "max_steps": 1} | config
        args = OrthoGradConfig(
            str(tmp_path / "out"), learning_rate=1e-2, per_device_train_batch_size=4, report_to="none", use_cpu=True,
            disable_tqdm=True, save_strategy="no", **settings,
        )  # fmt: skip
        forget, retain = make_samples(name, 4, seed=1), make_samples(name, 4, seed=2)
        sets = {"forget": rows(forget, speaker=["ann"] * 4), "retain": rows(retain, speaker=["bob", "cy"] * 2)}
        trainer = OrthoGradTrainer(
            wrap(make_model(name)),
            args,
            train_dataset=sets["retain"],
            forget_dataset=sets["forget"],
            eval_dataset=sets,
        )
        trainer.train()
        return trainer

    return make


def report_of(trainer):
    return evaluate_unlearning(trainer, group_column="speaker")


def lora(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value", "q_proj", "v_proj"]))


def logits_of(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def batch_of(trainer):
    return trainer.data_collator([trainer.forget_dataset[index] for index in range(2)])


# ---- Round trips ----


@pytest.mark.parametrize("name", ["whisper", "vit", "llama"])
def test_pushed_model_loads_with_the_same_logits(hub, unlearned, name):
    trainer = unlearned(name)
    trainer.push_to_hub(report=report_of(trainer))
    loaded = CLASSES[name].from_pretrained(REPO)
    inputs = trainer._prepare_inputs({k: v for k, v in batch_of(trainer).items() if k != "speaker"})
    torch.testing.assert_close(logits_of(loaded, inputs), logits_of(trainer.model, inputs))


def test_merged_adapter_is_published_alone(hub, unlearned):
    trainer = unlearned(wrap=lora)
    trainer.push_to_hub()
    files = hub.repositories[REPO].reachable()
    assert not any("adapter" in path for path in files)
    loaded = AutoModelForImageClassification.from_pretrained(REPO)
    batch = batch_of(trainer)
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(trainer.model, batch))


def test_adapter_that_is_not_merged_says_so(hub, unlearned, make_model, tmp_path):
    base = make_model("vit")
    base.save_pretrained(tmp_path / "base")

    def wrap(model):
        return lora(AutoModelForImageClassification.from_pretrained(tmp_path / "base"))

    trainer = unlearned(wrap=wrap, merge_adapter=False)
    trainer.create_model_card(finetuned_from="owner/base")
    folder = tmp_path / "out" / "public"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model_relation == "adapter"
    assert "Deleting the adapter undoes the unlearning" in card.text
    assert str(tmp_path) not in (folder / "adapter_config.json").read_text()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/base"
    publish(folder, REPO)
    hub.repositories["owner/base"] = repository = type(hub.repositories[REPO])(private=False)
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    repository.add("main", "base", files, None)
    loaded = AutoPeftModel.from_pretrained(REPO)
    batch = batch_of(trainer)
    wanted = logits_of(trainer.model, batch)
    found = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    found = PeftModel.from_pretrained(found, REPO)
    torch.testing.assert_close(logits_of(found, batch), wanted)
    assert loaded.peft_config["default"].base_model_name_or_path == "owner/base"


def test_adapter_over_a_base_that_is_not_public_is_refused(hub, unlearned):
    with pytest.raises(ValueError, match="`merge_adapter` is False, .* `finetuned_from`"):
        unlearned(wrap=lora, merge_adapter=False).create_model_card()


def test_sharded_adapter_is_not_published(unlearned):
    trainer = unlearned(wrap=lora, push_to_hub=False)
    trainer.is_fsdp_enabled = True  # as under FSDP2, which cannot gather a merge
    with pytest.raises(ValueError, match="A sharded LoRA model cannot be merged here, .* in one process"):
        trainer.push_to_hub()


# ---- The card ----


def test_card_says_what_was_measured(hub, unlearned):
    trainer = unlearned()
    report = report_of(trainer)
    trainer.push_to_hub(report=report, license="mit", language="en", dataset_tags="owner/pictures", request_id="r-1")
    card = ModelCard.load(REPO)
    card.validate()
    assert card.data.license == "mit" and card.data.pipeline_tag == "image-classification"
    assert card.data.library_name == "transformers" and "machine-unlearning" in card.data.tags
    found = {(one.dataset_type, one.metric_type): one.metric_value for one in card.data.eval_results}
    measured = report.models["unlearned"]
    assert found == {(name, "accuracy"): quality.value for name, quality in measured.items()} | {
        (name, "loss"): quality.loss for name, quality in measured.items()
    }
    assert card.data.datasets == "owner/pictures" or card.data.datasets == ["owner/pictures"]
    assert "no certificate of erasure" in card.text and "r-1" in card.text
    assert "**not** run: rounding the weights to 8 bits" in card.text and "prompting" not in card.text
    parameters = sum(p.numel() for p in trainer.model.parameters())
    assert f"`ViTForImageClassification` with {parameters:,} parameters" in card.text
    assert f'pipeline("image-classification", model="{REPO}")' in card.text


def test_arguments_of_trainer_are_taken(hub, unlearned, tmp_path):
    """Those that the example scripts of transformers pass, and by position."""
    trainer = unlearned(hub_private_repo=True)
    trainer.push_to_hub(
        finetuned_from="owner/base", tasks="image-classification", dataset_tags="owner/pictures", dataset="Pictures",
        dataset_args="small", language="en", model_name="named",
    )  # fmt: skip
    card = ModelCard.load(REPO)
    assert card.data.base_model == "owner/base" and card.data.base_model_relation == "finetune"
    assert "# named" in card.text and "Public training data: Pictures; small." in card.text
    assert hub.repositories[REPO].private
    trainer.create_model_card("de", "mit")
    data = ModelCard.load(tmp_path / "out" / "public" / "README.md").data
    assert (data.language, data.license) == ("de", "mit")


def test_card_without_a_report_claims_nothing(hub, unlearned, tmp_path):
    unlearned().create_model_card()
    card = ModelCard.load(tmp_path / "out" / "public" / "README.md")
    assert "Quality: not measured. Privacy: not measured." in card.text
    assert card.data.eval_results is None and "comparisons with" not in card.text


# ---- What never arrives ----


def test_nothing_that_identifies_the_forgotten_arrives(hub, make_model, make_samples, tmp_path):
    """Planted strings in every place that a run has, and the weights of the models that remember."""
    secret, hidden = "NIGHTINGALE-7731", tmp_path / "FOLDER-OF-CURLEW-5521"
    source = hidden / "original"
    make_model("vit").save_pretrained(source)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(source)
    model = AutoModelForImageClassification.from_pretrained(source)
    output = hidden / "out"
    model.save_pretrained(output / "finetuned")
    (output / "results.json").write_text(json.dumps({"forget_values": [secret]}))
    args = OrthoGradConfig(
        str(output), max_steps=3, per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True,
        push_to_hub=True, hub_strategy="end", hub_model_id=REPO, save_steps=1, logging_steps=1,
        run_name=secret, learning_rate=1e-2,
    )  # fmt: skip
    names, numbers = [f"{secret}-{index}" for index in range(4)], [91827364500 + index for index in range(4)]
    sets = {
        "forget": rows(make_samples("vit", 4, seed=1), speaker=names, text=names, number=numbers),
        "retain": rows(
            make_samples("vit", 4, seed=2), speaker=[f"kept-{name}" for name in names], text=names, number=numbers
        ),
    }
    trainer = OrthoGradTrainer(
        model, args, train_dataset=sets["retain"], forget_dataset=sets["forget"],
        eval_dataset=sets | {secret: sets["retain"]}, processing_class=processor,
    )  # fmt: skip
    trainer.train()
    assert (output / "checkpoint-1").is_dir() and not any("upload" in one or "commit" in one for one in hub.requests)
    attack = Relearning(sets["retain"], trainer, max_steps=1, learning_rate=1e-3, name=f"with {secret}")
    attacks = [Quantization(8), Quantization(4, name=f"{secret}, rounded"), attack]
    costs = {f"listening to {secret}": {"seconds": 1.0}}
    report = evaluate_unlearning(trainer, make_model("vit"), attacks, group_column="speaker", cost=costs)
    report.save(output)
    public = report.public()
    assert [check.name for check in public.checks][-3:] == [
        "forget accuracy after int8", "forget accuracy after attack 1", "forget accuracy under attack 2",
    ]  # fmt: skip
    assert {"unlearned, int8", "unlearned, attack 1"} < set(public.models) and "cost 1" in public.cost
    assert set(public.relearning) == {"attack 2"}
    trainer.save_model()
    trainer.push_to_hub(report=report)
    losses = [f"{loss:.6f}"[:8] for loss in report.losses["unlearned"]["forget"]]
    salt = read_salt(output / "_unlearning_salt.key").hex()
    contents = [*hub.received, *hub.storage.values()]
    contents += [data for found in hub.repositories[REPO].reachable().values() for data in found]
    everything = b"\n".join(contents).decode("latin-1")
    for planted in (secret, "CURLEW", salt, str(tmp_path), *losses, *map(str, numbers)):
        assert planted not in everything, planted
    assert not re.search(r'"row', everything)
    remembering = {path.read_bytes() for path in hidden.rglob("*.safetensors")}
    published = (output / "public" / "model.safetensors").read_bytes()
    assert not (remembering - {published}) & set(contents)
    paths = set(hub.repositories[REPO].reachable())
    assert paths == {
        ".gitattributes", "README.md", "config.json", "cost.png", "model.safetensors", "preprocessor_config.json",
        "relearning.png", "unlearning_record.json", "unlearning_report.json", "unlearning_report.md",
    }  # fmt: skip
    # the owner keeps the whole report, which says that it is theirs
    assert (output / "unlearning_report.md").read_text().startswith("(For the owner alone")
    assert UnlearningReport.load(output).losses and not UnlearningReport.load(output / "public").losses


def test_pushing_in_the_middle_of_a_run_is_refused(hub, unlearned):
    with pytest.raises(ValueError, match="`push_to_hub` with hub_strategy='every_save'"):
        unlearned(hub_strategy="every_save")


# ---- Before a run of hours ----


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_read", "the token may only read"), ("hf_wrong", "did not take the token"), (None, "there is no token")],
)
def test_permission_is_checked_before_training(hub, unlearned, monkeypatch, token, message):
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PermissionError, match=message):
        unlearned()


def test_offline_is_said_before_training(unlearned):
    with pytest.raises(PermissionError, match="HF_HUB_OFFLINE is set"):
        unlearned()


def test_name_without_an_owner_and_a_branch_of_its_own(hub, unlearned):
    trainer = unlearned(hub_model_id="short", hub_revision="unlearned")
    trainer.push_to_hub()
    repository = hub.repositories["owner/short"]
    assert "model.safetensors" in repository.commits[repository.branches["unlearned"]].files
    assert "model.safetensors" not in repository.commits[repository.branches["main"]].files
    assert (
        'model="owner/short"'
        in ModelCard(repository.commits[repository.branches["unlearned"]].files["README.md"].decode()).text
    )
    assert verify("owner/short", revision="unlearned") == []


# ---- Faults ----


@pytest.fixture
def folder(hub, unlearned, tmp_path, monkeypatch):
    """A prepared folder, and no waiting between tries."""
    trainer = unlearned()
    trainer.create_model_card(report=report_of(trainer))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.clear()
    return tmp_path / "out" / "public"


PASSING = {
    "500 three times on the commit": ("POST", "/commit/", 500, 3),
    "500 three times on the storage": ("PUT", "/storage/", 500, 3),
    "503 on the listing": ("GET", "/refs", 503, 2),
    "connection cut in mid-upload": ("PUT", "/storage/", "cut", 1),
    "connection cut in the commit": ("POST", "/commit/", "cut", 1),
}


@pytest.mark.parametrize("name", PASSING)
def test_fault_that_passes_is_waited_out(hub, folder, name):
    hub.faults.append(Fault(*PASSING[name]))
    publish(folder, REPO)
    assert hub.faults[0].times == 0
    assert hub.repositories[REPO].reachable()["model.safetensors"] == {(folder / "model.safetensors").read_bytes()}


STAYING = {
    "403 on the storage": ("PUT", "/storage/", 403, "403"),
    "401": ("POST", "/preupload/", 401, "401"),
    "403": ("POST", "/commit/", 403, "403"),
    "404 on a private repository": ("GET", "/refs", 404, "404"),
    "409": ("POST", "/commit/", 409, "409"),
}


@pytest.mark.parametrize("name", STAYING)
def test_fault_that_stays_is_said_and_a_second_push_finishes(hub, folder, name, caplog):
    method, path, status, message = STAYING[name]
    hub.faults.append(Fault(method, path, status, times=100))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises((OSError, RuntimeError)) as raised, caplog.at_level(logging.ERROR):
        publish(folder, REPO)
    assert message in f"{raised.value} {raised.value.__cause__}"
    assert "What was to be published is whole in" in caplog.text
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    hub.faults.clear()
    publish(folder, REPO)
    assert verify(REPO) == []


def test_card_is_whole_or_the_old_one_when_the_disk_is_full(folder):
    before = (folder / "README.md").read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_card(folder, CardOptions(model_name="other"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder / "README.md").read_text() == before and not list(folder.glob("*.partial"))


def test_timeout_is_waited_out(hub, folder, monkeypatch):
    """The first answer comes later than the client waits."""
    waits = {"timeout": 1.0}
    client = huggingface_hub.utils.get_session()
    monkeypatch.setattr(client, "timeout", waits["timeout"])
    hub.faults.append(Fault("POST", "/commit/", "slow", times=1))
    publish(folder, REPO)
    assert hub.faults[0].times == 0 and verify(REPO) == []


# ---- History ----


def old_repository(hub, name=REPO, tag=False, pull_request=False):
    hub.repositories[name] = repository = Repository(private=False)
    first = repository.add("main", "trained", {"model.safetensors": b"remembers"}, None)
    if tag:
        repository.tags["v1"] = first
    if pull_request:
        repository.add("refs/pr/1", "convert", {"pytorch_model.bin": b"remembers too"}, first)
    repository.add("main", "remove", {"README.md": b"moved"}, first)
    return repository


def test_history_that_remembers_is_refused(hub, folder, unlearned):
    repository = old_repository(hub)
    refused = r"model.safetensors at \w{8} \(refs/heads/main\)\. Push to another repository .* squash_history=True"
    with pytest.raises(ValueError, match=refused):
        publish(folder, REPO)
    with pytest.raises(ValueError, match=refused):  # before training, too
        unlearned()
    old_repository(hub, "owner/out")
    with pytest.raises(ValueError, match="owner/out"):  # named as the folder, where no name is given
        unlearned(hub_model_id=None)
    assert len(repository.commits) == 2


def test_squashed_history_holds_old_weights_nowhere(hub, folder, caplog):
    repository = old_repository(hub, tag=True)
    done = publish(folder, REPO, squash_history=True)
    held = repository.history("main")
    assert len(held) == 1 and repository.commits[held[0]].files["model.safetensors"] != b"remembers"
    assert [one.ref for one in done.remaining] == ["refs/tags/v1"] and "model.safetensors" in caplog.text


def test_retract(hub, folder):
    repository = old_repository(hub, tag=True, pull_request=True)
    found = retract(REPO)
    assert {one.ref for one in found.remaining} == {"refs/tags/v1", "refs/pr/1"} and not found.removed
    found = retract(REPO, delete_refs=True)
    assert found.deleted_refs == ["refs/tags/v1"] and not repository.tags
    assert {one.path for one in found.remaining} == {"model.safetensors", "pytorch_model.bin"}  # of the pull request
    assert "Out of reach: forks" in str(found)
    repository.pull_requests.clear()
    assert not retract(REPO).remaining and b"remembers" not in repository.reachable().get("model.safetensors", set())


@pytest.mark.parametrize("name", ["model/0_0.distcp", "model.nemo", "weights.keras", "consolidated.tar"])
def test_weights_of_other_kinds_count(hub, folder, name):
    hub.repositories[REPO] = repository = Repository(private=False)
    first = repository.add("main", "trained", {name: b"remembers"}, None)
    repository.add("main", "remove", {"README.md": b"moved"}, first)
    with pytest.raises(ValueError, match=rf"{name} at "):
        publish(folder, REPO)


def test_what_would_be_loaded_with_the_model_goes(hub, folder):
    """And nothing else; the commit that is returned is there after the history was rewritten."""
    hub.repositories[REPO] = repository = Repository(private=False)
    kept = {"notes.md", "results.csv", "docs/README.md", "data/tokenizer.json", "train_data.zip"}
    old = ("adapter_config.json", "vocab.json", "old [1]/model.bin", *kept)
    repository.add("main", "before", dict.fromkeys(old, b"{}"), None)
    done = publish(folder, REPO, squash_history=True)
    left = set(repository.commits[repository.branches["main"]].files)
    assert left & set(old) == kept
    assert [one.path for one in done.remaining] == ["train_data.zip"]  # nobody knows what is in it
    assert done.commit.oid == repository.branches["main"] and done.commit.oid in done.commit.commit_url
    assert verify(REPO) == ["data/tokenizer.json stands in no record", "train_data.zip stands in no record"]


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


def test_plain_trainer_does_not_push_what_is_the_owners(hub, unlearned, make_model, make_samples, tmp_path):
    unlearned(push_to_hub=False).create_model_card()
    samples = make_samples("vit", 4, seed=2)
    args = {"report_to": "none", "use_cpu": True, "max_steps": 1}
    refused = "_unlearning_salt.key, which are for the owner alone"
    with pytest.raises(ValueError, match=refused):
        OrthoGradTrainer(
            make_model("vit"), OrthoGradConfig(str(tmp_path / "out"), push_to_hub=True, **args), train_dataset=samples
        )
    plain = OrthoGradTrainer(make_model("vit"), OrthoGradConfig(str(tmp_path / "out"), **args), train_dataset=samples)
    with pytest.raises(ValueError, match=refused):
        plain.push_to_hub()


def test_adapter_of_an_earlier_push_is_named(hub, folder):
    hub.repositories[REPO] = repository = Repository(private=False)
    repository.add("main", "adapter", {"adapter_model.safetensors": b"difference"}, None)
    with pytest.raises(ValueError, match="Merged weights minus a public adapter give the original back"):
        publish(folder, REPO)


# ---- The record ----


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


# ---- Commands ----


def test_commands_say_what_they_did(hub, folder, capsys, make_samples, tmp_path):
    assert run(["publish", str(folder), REPO]) == 0 and "Published: http" in capsys.readouterr().out
    assert run(["verify", REPO]) == 0 and "As recorded" in capsys.readouterr().out
    rows(make_samples("vit", 4, seed=1)).to_parquet(tmp_path / "forget.parquet")
    asked = ["verify", str(folder), "--salt", str(folder.parent / "_unlearning_salt.key")]
    assert run([*asked, "--rows", str(tmp_path / "forget.parquet"), "--row", "3"]) == 0
    assert "the row was in a request" in capsys.readouterr().out
    assert run([*asked, "--rows", str(tmp_path / "forget.parquet"), "--row", "9"]) == 1
    assert "has rows 0 to 3" in capsys.readouterr().err
    assert run(["card", str(folder), "--model_name", "Renamed", "--license", "mit"]) == 0
    assert ModelCard.load(folder / "README.md").data.license == "mit"
    assert run(["retract", "owner/nothing"]) == 1 and "RepositoryNotFoundError" in capsys.readouterr().err
    repository = old_repository(hub, "owner/old", tag=True)
    assert run(["retract", "owner/old"]) == 1 and "Still there: model.safetensors" in capsys.readouterr().out
    assert run(["retract", "owner/old", "--delete_refs"]) == 0 and not repository.tags
    (folder / "model.safetensors").write_bytes(b"")
    assert run(["verify", str(folder)]) == 1 and "Differs: model.safetensors" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run(["publish"])
    assert ended.value.code == 2


# ---- Signing, as the guide shows it ----


def test_signed_folder_is_published_with_its_signature(hub, folder, tmp_path):
    pytest.importorskip("model_signing", reason="signing is an extra")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pem").write_bytes(private)
    (tmp_path / "key.pub").write_bytes(public)

    def model_signing(*arguments):
        command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True).returncode

    signature = folder / "model.sig"
    assert model_signing("sign", "key", folder, "--private_key", tmp_path / "key.pem", "--signature", signature) == 0
    publish(folder, REPO)
    local = tmp_path / "downloaded"
    huggingface_hub.snapshot_download(REPO, local_dir=local)
    check = ("verify", "key", local, "--signature", local / "model.sig", "--public_key", tmp_path / "key.pub")
    check += ("--ignore-paths", local / ".cache")
    assert model_signing(*check) == 0
    with open(local / "model.safetensors", "ab") as file:
        file.write(b"x")
    assert model_signing(*check) != 0
