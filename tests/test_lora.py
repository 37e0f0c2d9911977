import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.checkpoints import merged_copy


K = 3


def adapted(model, **settings):
    # the projections of ViT have gone by both names
    return get_peft_model(model, LoraConfig(r=2, target_modules=r".*\.(q_proj|v_proj|query|value)", **settings))


def trained(model, kind, make_samples, tmp_path, **settings):
    args = OrthoGradConfig(
        str(tmp_path), per_device_train_batch_size=K, per_device_forget_batch_size=3, alpha=0.0, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none", save_strategy="no", logging_steps=1,
        **{"max_steps": 1, "learning_rate": 0.1, **settings},
    )  # fmt: skip
    retain, forget = make_samples(kind, K, seed=1), make_samples(kind, 3, seed=2)
    trainer = OrthoGradTrainer(model, args, train_dataset=retain, forget_dataset=forget)
    trainer.train()
    return trainer


def parameters_of(model, word):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad and word in name}


@pytest.mark.parametrize("engine", ["gram", "func", "loop"])
def test_fresh_adapter_moves_orthogonally(engine, make_model, make_samples, tmp_path, loop_gradients):
    """At the start B is zero, so every gradient of A is zero: no direction may be taken from that."""
    model = adapted(make_model("vit"))
    rows = loop_gradients(model, make_samples("vit", K, seed=1)).double()
    before = torch.cat([p.flatten() for p in parameters_of(model, "").values()])
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = trained(model, "vit", make_samples, tmp_path, gradient_engine=engine)
    change = (torch.cat([p.flatten() for p in parameters_of(model, "").values()]) - before).double()
    assert change.norm() > 0
    assert torch.nn.functional.cosine_similarity(change[None], rows).abs().max() <= 1e-4
    assert trainer.state.log_history[0]["projection_rank"] == K
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)


def test_lora_only_projection_leaves_the_head_unprojected(make_model, make_samples, tmp_path, loop_gradients):
    model = adapted(make_model("vit"), modules_to_save=["classifier"])
    retain = make_samples("vit", K, seed=1)
    lora, head = parameters_of(model, "lora_"), parameters_of(model, "classifier")
    assert lora and head
    lora_rows = loop_gradients(model, retain, lora).double()
    head_forget = loop_gradients(model, make_samples("vit", 3, seed=2), head).mean(dim=0)
    trained(model, "vit", make_samples, tmp_path, projection_parameters="lora")
    lora_change = torch.cat([(model.get_parameter(name) - p).flatten() for name, p in lora.items()]).detach().double()
    head_change = torch.cat([(model.get_parameter(name) - p).flatten() for name, p in head.items()]).detach()
    assert torch.nn.functional.cosine_similarity(lora_change[None], lora_rows).abs().max() <= 1e-4
    torch.testing.assert_close(head_change, 0.1 * head_forget, rtol=1e-3, atol=1e-6)


def test_adapter_trains_under_activation_checkpointing(make_model, make_samples, tmp_path):
    """Without inputs that require gradients a checkpointed model would silently leave its adapter untrained."""
    changes = []
    for checkpointing in (False, True):
        model = adapted(make_model("llama"))
        before = parameters_of(model, "lora_B")
        trainer = trained(model, "llama", make_samples, tmp_path, gradient_checkpointing=checkpointing)
        assert trainer.gradient_engine.name == "gram"
        changes.append(torch.cat([(model.get_parameter(name) - p).flatten() for name, p in before.items()]).detach())
    assert changes[0].norm() > 0
    torch.testing.assert_close(changes[0], changes[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("merge", [True, False])
def test_saved_model_is_merged_unless_told(merge, make_model, make_samples, tmp_path):
    model = adapted(make_model("vit"))
    settings = {"max_steps": 3, "merge_adapter": merge}
    trainer = trained(model, "vit", make_samples, tmp_path, **settings)
    trainer.save_model(tmp_path / "final")
    batch = torch.stack([example["pixel_values"] for example in make_samples("vit", 2, seed=5)])
    with torch.no_grad():
        expected, plain = model.eval()(pixel_values=batch).logits, make_model("vit").eval()(pixel_values=batch).logits
    assert (expected - plain).abs().max() > 1e-4
    base_class = type(make_model("vit"))
    if merge:
        assert not (tmp_path / "final" / "adapter_config.json").exists()
        loaded = base_class.from_pretrained(tmp_path / "final").eval()
    else:
        loaded = PeftModel.from_pretrained(make_model("vit"), tmp_path / "final").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values=batch).logits, expected, rtol=1e-4, atol=1e-5)
    # the trainer goes on with its adapter
    assert isinstance(trainer.model, PeftModel)


def test_checkpoints_keep_the_adapter(make_model, make_samples, tmp_path):
    model = adapted(make_model("vit"))
    args = OrthoGradConfig(
        str(tmp_path),
        per_device_train_batch_size=K,
        max_steps=2,
        save_steps=1,
        save_strategy="steps",
        report_to="none",
    )
    trainer = OrthoGradTrainer(
        model, args, train_dataset=make_samples("vit", K, seed=1), forget_dataset=make_samples("vit", 3, seed=2)
    )
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "adapter_config.json").exists()


def test_merged_weights_have_no_adapter_beside_them(make_model, make_samples, tmp_path, caplog):
    """A folder that holds an adapter already: `from_pretrained` would put it on top of the merge once more."""
    model = adapted(make_model("vit"))
    trainer = trained(model, "vit", make_samples, tmp_path, max_steps=3)
    model.save_pretrained(tmp_path / "final")
    assert (tmp_path / "final" / "adapter_config.json").exists()
    trainer.save_model(tmp_path / "final")
    assert not [path.name for path in (tmp_path / "final").iterdir() if "adapter" in path.name]
    assert "the adapter is merged into the weights" in caplog.text
    batch = torch.stack([example["pixel_values"] for example in make_samples("vit", 2, seed=5)])
    loaded = type(make_model("vit")).from_pretrained(tmp_path / "final").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(pixel_values=batch).logits, model.eval()(pixel_values=batch).logits, rtol=1e-4, atol=1e-5
        )


def test_the_merge_is_saved_whatever_holds_the_state(make_model, make_samples, tmp_path, monkeypatch):
    """Under DeepSpeed Trainer takes the state from DeepSpeed's own model, with the adapter's names: not here."""
    trainer = trained(adapted(make_model("vit")), "vit", make_samples, tmp_path)
    monkeypatch.setattr(type(trainer), "is_deepspeed_enabled", True, raising=False)
    trainer.deepspeed = None  # would fail if it were asked
    trainer.save_model(tmp_path / "final")
    loaded, report = type(make_model("vit")).from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_merging_copies_nothing_on_the_device(make_model):
    model = adapted(make_model("vit"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    merged = merged_copy(model)
    assert not isinstance(merged, PeftModel)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not held & {p.untyped_storage().data_ptr() for p in merged.parameters()}


def test_a_published_adapter_gives_the_original_back_from_the_merge(make_model, make_samples, tmp_path):
    """Why an adapter of the run may never be public: the merge minus what it adds is the model that remembers."""
    model = adapted(make_model("vit"))
    trained(model, "vit", make_samples, tmp_path, max_steps=3)
    merged = dict(merged_copy(model).named_parameters())
    original = dict(make_model("vit").named_parameters())
    changed = 0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            own = name.removeprefix("base_model.model.") + ".weight"
            added = module.get_delta_weight("default").detach()
            changed += added.abs().max() > 0
            torch.testing.assert_close(merged[own].detach() - added, original[own].detach(), rtol=0, atol=1e-6)
    assert changed
