"""FSDP2 and DeepSpeed in two processes give the model that one process gives, and what FSDP2 saves loads."""

import pytest
import torch
import transformers
from launched import KINDS, launch, settings, train
from peft import PeftModel

from hf_orthograd.baselines import WgaTrainer
from hf_orthograd.publishing import verify


CLASSES = {
    "whisper": transformers.WhisperForConditionalGeneration,
    "vit": transformers.ViTForImageClassification,
    "llama": transformers.LlamaForCausalLM,
}
UPDATE = {"projection_target": "update", "optim": "adamw_torch", "adam_epsilon": 1e-2, "alpha": 0.0}
VARIANTS = {
    "loop": {"gradient_engine": "loop"},
    "update": UPDATE,
    "mean": {"projection": "mean"},
    "none": {"projection": "none"},
    "checkpointing": {"gradient_checkpointing": True},
    "predictions kept": {"retain_loss": "kl", "learning_rate": 0.3},
    "tokens weighed": {"make": WgaTrainer, "retain_loss": "kl", "learning_rate": 0.3},
    "predictions kept, none": {"retain_loss": "kl", "learning_rate": 0.3, "projection": "none"},
}


def sharded(kind):
    # of the two classes that ViT names for wrapping, accelerate 1.15 shards the embeddings twice
    wrapped = {"transformer_layer_cls_to_wrap": ["ViTLayer"]} if kind == "vit" else {}
    return {"fsdp": True, "fsdp_config": {"version": 2, **wrapped}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def launches(folder):
    runs = [(f"{kind}-{lora}", kind, lora, settings(4) | sharded(kind)) for kind in KINDS for lora in (False, True)]
    runs += [(name, "llama", False, settings(4) | sharded("llama") | more) for name, more in VARIANTS.items()]
    runs.append(("accumulation", "llama", False, settings(2, 2) | sharded("llama")))
    in_parts = {"fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
    runs.append(("saved in parts", "llama", False, settings(4) | sharded("llama") | in_parts))
    return launch(folder, 2, runs)


def assert_equal(found, trainer):
    trained = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert set(found["parameters"]) == set(trained)
    for name, parameter in trained.items():
        assert (found["parameters"][name] - parameter).norm() <= 1e-5 * parameter.norm() + 1e-8, name


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_give_the_same_model_and_load(kind, lora, launches, folder, tmp_path):
    trainer = train(tmp_path, kind, lora, settings(8))
    found = launches[f"{kind}-{lora}"]
    assert_equal(found, trainer)
    saved = folder / f"{kind}-{lora}-saved"
    if lora:  # sharded, an adapter is not merged
        loaded = PeftModel.from_pretrained(trainer.model.unload(), saved)
    else:
        loaded = CLASSES[kind].from_pretrained(saved)
    parameters = dict(loaded.named_parameters())
    for name, parameter in found["parameters"].items():
        assert torch.equal(parameters[name], parameter), name


@pytest.mark.parametrize("variant", [*VARIANTS, "accumulation"])
def test_shards_give_the_same_model_in_every_variant(variant, launches, tmp_path):
    trainer = train(tmp_path, "llama", False, settings(8) | VARIANTS.get(variant, {}))
    assert_equal(launches[variant], trainer)


def test_what_is_sharded_is_published_whole_or_refused_in_all_processes(launches, folder):
    assert launches["llama-False"]["card_errors"] == [None, None]
    for error in launches["llama-True"]["card_errors"]:
        assert error.startswith("ValueError: A sharded LoRA model cannot be merged here") and "in one process" in error
    first, second = launches["saved in parts"]["card_errors"]
    assert first.startswith("ValueError: `save_model()` saved no weights") and "FULL_STATE_DICT" in first
    assert second == f"RuntimeError: The first process failed: {first}"
    assert verify(folder / "public") == []  # of the run before


def zero(stage):
    automatic = dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    )
    # the tests' plain SGD is one that DeepSpeed has not been tested with
    return {"deepspeed": {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, **automatic}}


ZERO = {
    "zero-1": ("llama", False, settings(4) | zero(1)),
    "zero-2": ("llama", False, settings(4) | zero(2)),
    "zero-2-accumulation": ("llama", False, settings(2, 2) | zero(2)),
    "zero-2-lora": ("whisper", True, settings(4) | zero(2)),
    "zero-2-whisper": ("whisper", False, settings(4) | zero(2)),
    "zero-2-vit": ("vit", False, settings(4) | zero(2)),
}


@pytest.fixture(scope="module")
def zero_launches(tmp_path_factory):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    return launch(tmp_path_factory.mktemp("zero"), 2, [(name, *run) for name, run in ZERO.items()])


@pytest.mark.parametrize("name", ZERO)
def test_deepspeed_gives_the_same_model(name, zero_launches, tmp_path):
    kind, lora, _ = ZERO[name]
    assert_equal(zero_launches[name], train(tmp_path, kind, lora, settings(8)))
