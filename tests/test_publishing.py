"""Publishing, over HTTP by the real client: what arrives, and what never does."""

import inspect
import json
import re

import pytest
import torch
from huggingface_hub import ModelCard, RepoCard
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from published import REPO, report_of, rows
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSpeechSeq2Seq,
    ViTImageProcessor,
)

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.evaluation import Quantization, Relearning, UnlearningReport, evaluate_unlearning
from hf_orthograd.publishing import publish, read_salt, verify


CLASSES = {
    "whisper": AutoModelForSpeechSeq2Seq,
    "vit": AutoModelForImageClassification,
    "llama": AutoModelForCausalLM,
}


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


# ---- The card ----


def test_card_says_what_was_measured(hub, unlearned):
    trainer = unlearned()
    report = report_of(trainer)
    trainer.push_to_hub(report=report, license="mit", language="en", dataset_tags="owner/pictures", request_id="r-1")
    card = ModelCard.load(REPO)
    # older clients ask the public Hub, wherever they are sent
    if "constants.ENDPOINT" in inspect.getsource(RepoCard.validate):
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
