import pytest
import torch

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.gradients import ForgetBatch, GramEngine


def make_trainer(tmp_path, model, kind, make_samples, **settings):
    settings = {"per_device_train_batch_size": 6, "per_device_forget_batch_size": 4} | settings
    args = OrthoGradConfig(str(tmp_path), report_to="none", **settings)
    retain, forget = make_samples(kind, 12, seed=1), make_samples(kind, 8, seed=2)
    return OrthoGradTrainer(model, args, train_dataset=retain, forget_dataset=forget)


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2", "vit", "llama"])
def test_estimate_counts_what_the_step_keeps(kind, tmp_path, make_model, make_samples):
    trainer = make_trainer(tmp_path, make_model(kind), kind, make_samples)
    estimate = trainer.estimate()
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert estimate.projected == sum(p.numel() for p in trained.values()) == sum(r.parameters for r in estimate.rules)
    assert sum(rule.tensors for rule in estimate.rules) == len(trained)
    assert (estimate.forget_samples, estimate.retain_samples) == (4, 6)
    # counted by hand for the matrix products: GradDiff has 3 units for each sample; here inner products come on top
    assert 1 < estimate.relative_time < 1.7

    # tensors by form, against what a step really keeps
    engine = trainer.make_gradient_engine(trainer.model)
    assert isinstance(engine, GramEngine)
    forget, retain = trainer.first_batch("forget_dataset", 4), trainer.first_batch("train_dataset", 6)
    step = engine.measure(trainer.model, [ForgetBatch(forget.inputs, forget.size)], [retain])
    factors = sum(not kept.are_dense for kept in step.kept.values())
    assert sum(rule.tensors for rule in estimate.rules if "factors kept" in rule.form) == factors


def test_estimate_changes_nothing(tmp_path, make_model, make_samples):
    model = make_model("vit", dropout=0.1).eval()
    trainer = make_trainer(tmp_path, model, "vit", make_samples)
    before = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    trainer.estimate()
    assert torch.equal(torch.rand(1), expected)
    assert not model.training
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_estimates_are_ordered_as_the_engines_are(tmp_path, make_model, make_samples):
    found = {}
    for engine in ("gram", "func", "loop"):
        trainer = make_trainer(tmp_path, make_model("vit"), "vit", make_samples, gradient_engine=engine)
        found[engine] = trainer.estimate()
    plain = make_trainer(tmp_path, make_model("vit"), "vit", make_samples, projection="none").estimate()
    assert plain.relative_time == 1 and plain.memory == plain.plain_memory == found["gram"].plain_memory
    assert found["loop"].relative_time > found["func"].relative_time
    assert found["func"].memory == found["loop"].memory
    assert found["gram"].memory < found["func"].memory


def test_estimate_prints_a_table_and_counts_the_optimizer(tmp_path, make_model, make_samples):
    adam = make_trainer(tmp_path, make_model("whisper"), "whisper", make_samples).estimate()
    sgd = make_trainer(tmp_path, make_model("whisper"), "whisper", make_samples, optim="sgd").estimate()
    assert adam.memory - sgd.memory == 8 * adam.projected
    printed = str(adam)
    assert f"{adam.projected:,} under projection" in printed
    assert "embedding + linear" in printed  # the tied vocabulary
    assert "layer_norm" in printed


def test_estimate_counts_the_starting_model(tmp_path, make_model, make_samples):
    """A copy of what is trained, and a forward and a backward pass over the retain samples."""
    samples = {"train_dataset": make_samples("vit", 8), "forget_dataset": make_samples("vit", 8, seed=1)}
    found = {}
    for retain_loss in ("nll", "kl"):
        args = OrthoGradConfig(str(tmp_path), retain_loss=retain_loss, report_to="none")
        found[retain_loss] = OrthoGradTrainer(make_model("vit"), args, **samples).estimate()
    trained = sum(parameter.nbytes for parameter in make_model("vit").parameters())
    assert found["kl"].memory - found["nll"].memory == trained
    assert 1.2 < found["kl"].relative_time / found["nll"].relative_time < 1.6


def test_estimate_needs_a_forget_set(tmp_path, make_model, make_samples):
    args = OrthoGradConfig(str(tmp_path), report_to="none")
    trainer = OrthoGradTrainer(make_model("vit"), args, train_dataset=make_samples("vit", 4))
    with pytest.raises(ValueError, match="needs a `forget_dataset`"):
        trainer.estimate()
