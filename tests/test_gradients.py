import logging

import numpy as np
import pytest
import torch
from engines import forget_batch, retain_batch, weighed
from torch import nn
from torch.utils.data import default_collate

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.gradients import (
    FunctionalEngine,
    GramEngine,
    LoopEngine,
    MeanEngine,
    PlainEngine,
    UnsupportedModelError,
    choose_engine,
    register_rule,
)
from hf_orthograd.gradients.gram import forms
from hf_orthograd.gradients.gram.forms import Dense, Outer
from hf_orthograd.gradients.gram.rules import RULES
from hf_orthograd.objectives import PerSampleLoss
from hf_orthograd.parallel import Parameters


ALL = ["whisper", "wav2vec2", "vit", "llama"]


def batch(samples):
    return default_collate([samples[index] for index in range(len(samples))])


def trainable(model):
    return Parameters({name: p for name, p in model.named_parameters() if p.requires_grad}, {})


def slopes(losses):
    return torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype)


def measure(engine_class, model, losses, forget, retain, parameters=None, **settings):
    torch.manual_seed(5)
    np.random.seed(5)
    engine = engine_class(parameters or trainable(model), losses)
    return engine.measure(model, [forget_batch(forget, slopes)], [retain_batch(retain)], per_parameter=True)


def relative_error(gram, reference):
    norms = reference.diagonal().sqrt()
    return ((gram - reference).abs() / (norms * norms[:, None])).max().item()


def in_float64(tensors):
    return {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}


@pytest.mark.parametrize("kind", ALL)
def test_engines_agree_with_the_float64_loop(kind, make_model, make_samples):
    forget, retain = batch(make_samples(kind, 3, seed=2)), batch(make_samples(kind, 5, seed=1))
    model = make_model(kind).eval()
    losses = PerSampleLoss(model)
    found = {"gram": measure(GramEngine, model, losses, forget, retain)}
    found["loop"] = measure(LoopEngine, model, losses, forget, retain)
    if kind in ("whisper", "vit"):
        found["func"] = measure(FunctionalEngine, model, losses, forget, retain)
    model.double()
    double_losses = _float64_losses(kind)
    reference = measure(LoopEngine, model, double_losses, in_float64(forget), in_float64(retain)).gram
    for name, step in found.items():
        assert relative_error(step.gram, reference) <= 1e-5, name


def _float64_losses(kind):
    """The same losses written again without the library's cast to float32."""

    def compute(model, inputs):
        labels = inputs["labels"]
        logits = model(**inputs).logits
        if kind == "vit":
            return nn.functional.cross_entropy(logits, labels, reduction="none")
        if kind == "wav2vec2":
            frames = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(-1))
            log_probabilities = logits.log_softmax(-1)
            return torch.stack(
                [
                    nn.functional.ctc_loss(
                        log_probabilities[i, : frames[i]], labels[i][labels[i] >= 0], frames[i : i + 1],
                        (labels[i] >= 0).sum()[None], blank=0, reduction="mean",
                    )
                    for i in range(len(labels))
                ]
            )  # fmt: skip
        if kind == "llama":
            logits, labels = logits[:, :-1], labels[:, 1:]
        return torch.stack(
            [nn.functional.cross_entropy(logits[i], labels[i], ignore_index=-100) for i in range(len(labels))]
        )

    return compute


@pytest.mark.parametrize("kind", ALL)
def test_gram_under_dropout_uses_the_forward_that_the_step_uses(kind, make_model, make_samples):
    """Dropout and SpecAugment active: with the same random numbers the loop must find the same inner products."""
    forget, retain = batch(make_samples(kind, 3, seed=2)), batch(make_samples(kind, 4, seed=1))
    model = make_model(kind, dropout=0.2).train()
    losses = PerSampleLoss(model)
    step = measure(GramEngine, model, losses, forget, retain)
    reference = measure(LoopEngine, model, losses, forget, retain)
    assert relative_error(step.gram, reference.gram) <= 1e-5
    for name, gram in reference.grams.items():
        assert (step.grams[name] - gram).abs().max() <= 1e-4 * gram.abs().max() + 1e-7 * reference.gram.max(), name
    # and the update comes from the forward pass that was measured: w^T K w is the squared norm of its gradient
    weights = torch.linspace(-1, 1, len(step.gram) - 1)
    combination = step.combine(weighed(0.7, 0.0, dict.fromkeys(step.parameters.projected, weights)))
    gradients = torch.autograd.grad(combination, list(trainable(model).projected.values()), materialize_grads=True)
    squared = sum(gradient.double().square().sum() for gradient in gradients)
    weights = torch.cat((torch.tensor([0.7]), weights)).double()
    torch.testing.assert_close(squared, weights @ step.gram @ weights, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("engine_class", [GramEngine, LoopEngine])
def test_autocast_does_not_reach_the_inner_products(kind, engine_class, make_model, make_samples):
    """The Gram matrix and the update agree to float32, though layers run in bfloat16 and all is under autocast."""
    forget, retain = batch(make_samples(kind, 3, seed=2)), batch(make_samples(kind, 4, seed=1))
    model = make_model(kind).eval()
    weights = torch.linspace(-1, 1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        step = measure(engine_class, model, PerSampleLoss(model), forget, retain)
        combination = step.combine(weighed(0.7, 0.0, dict.fromkeys(step.parameters.projected, weights)))
    gradients = torch.autograd.grad(combination, list(trainable(model).projected.values()), materialize_grads=True)
    squared = sum(gradient.double().square().sum() for gradient in gradients)
    weights = torch.cat((torch.tensor([0.7]), weights)).double()
    torch.testing.assert_close(squared, weights @ step.gram @ weights, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("engine_class", [GramEngine, FunctionalEngine, MeanEngine, PlainEngine])
def test_combination_is_that_of_the_loop(kind, engine_class, make_model, make_samples):
    if engine_class is FunctionalEngine and kind in ("wav2vec2", "llama"):
        pytest.skip("torch.func cannot vectorise this model")
    model = make_model(kind).eval()
    forget, retain = batch(make_samples(kind, 2, seed=2)), batch(make_samples(kind, 3, seed=1))
    parameters, losses = trainable(model), PerSampleLoss(model)
    found = {}
    for one in (engine_class, LoopEngine):
        step = measure(one, model, losses, forget, retain)
        own = {"mean": torch.tensor([0.7]), "loop": torch.tensor([1.0, -2.0, 0.5])}
        coefficients = dict.fromkeys(step.parameters.projected, own.get(one.name, own["loop"]))
        if engine_class is MeanEngine and one is LoopEngine:
            coefficients = dict.fromkeys(step.parameters.projected, torch.full((3,), 0.7 / 3))
        if engine_class is PlainEngine:
            coefficients = {}
        loss = step.combine(weighed(-0.3, 0.6, coefficients))
        assert loss == 0
        found[one] = torch.autograd.grad(loss, list(parameters.projected.values()), materialize_grads=True)
    scale = max(gradient.abs().max() for gradient in found[LoopEngine])
    for name, one, other in zip(parameters.projected, found[engine_class], found[LoopEngine], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale.item(), msg=name)


@pytest.mark.parametrize("engine_class", [GramEngine, FunctionalEngine, LoopEngine])
def test_combination_leaves_unprojected_parameters_alone(engine_class, make_model, make_samples):
    model = make_model("vit").eval()
    named = dict(model.named_parameters())
    parameters = Parameters(
        projected={name: p for name, p in named.items() if "classifier" not in name},
        others={name: p for name, p in named.items() if "classifier" in name},
    )
    forget, retain = batch(make_samples("vit", 2, seed=2)), batch(make_samples("vit", 3, seed=1))
    step = measure(engine_class, model, PerSampleLoss(model), forget, retain, parameters)
    assert set(step.grams) == set(parameters.projected)
    step.combine(
        weighed(0.0, 0.0, dict.fromkeys(step.parameters.projected, torch.tensor([1.0, -2.0, 0.5])))
    ).backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-7 for p in parameters.others.values())
    assert named["vit.embeddings.cls_token"].grad.abs().max() > 1e-4
    model.zero_grad()
    step = measure(engine_class, model, PerSampleLoss(model), forget, retain, parameters)
    step.combine(weighed(0.0, 1.0, {})).backward()
    assert all(p.grad.abs().max() > 1e-4 for p in parameters.others.values())


@pytest.mark.parametrize("held_at_once", [1, 150, 1 << 17])  # 150: two samples of three
def test_outer_forms_agree_with_dense(held_at_once, monkeypatch):
    monkeypatch.setattr(forms, "_PAIRS", held_at_once)
    torch.manual_seed(0)
    shape = torch.Size((9, 4))
    pieces = [
        Outer(torch.randn(3, 5, 9), torch.randn(3, 5, 4), shape),
        Outer(torch.randint(0, 9, (2, 6)), torch.randn(2, 6, 4), shape),
        Outer(torch.randn(3, 0, 9), torch.randn(3, 0, 4), shape),  # of no positions
    ]
    for one in pieces:
        for other in pieces:
            expected = one.dense().flatten(1) @ other.dense().flatten(1).T
            torch.testing.assert_close(one.inner(other), expected)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("engine_class", [GramEngine, LoopEngine])
def test_one_matrix_is_the_sum_of_those_of_all_parameters(kind, engine_class, make_model, make_samples):
    """And the update is the same, though small parameters are then multiplied side by side."""
    forget, retain = batch(make_samples(kind, 3, seed=2)), batch(make_samples(kind, 5, seed=1))
    model = make_model(kind).eval()
    engine, found = engine_class(trainable(model), PerSampleLoss(model)), []
    for per_parameter in (True, False):
        batches = [forget_batch(forget, slopes)], [retain_batch(retain)]
        step = engine.measure(model, *batches, per_parameter=per_parameter)
        coefficients = dict.fromkeys(step.parameters.projected, torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]))
        update = step.combine(weighed(-0.3, 0.6, coefficients))
        found.append((step, torch.autograd.grad(update, list(step.parameters.trainable.values()), allow_unused=True)))
    (each, gradients), (together, expected) = found
    assert set(together.grams) == {""} and set(each.grams) == set(each.parameters.projected)
    assert relative_error(together.gram, each.gram) <= 1e-6
    for one, other in zip(gradients, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * other.abs().max().item())


class Hidden(torch.autograd.Function):
    """Custom functions do not show themselves to the recorder."""

    @staticmethod
    def forward(ctx, features, weight):
        ctx.save_for_backward(features, weight)
        return features @ weight

    @staticmethod
    def backward(ctx, gradient):
        features, weight = ctx.saved_tensors
        return gradient @ weight.T, features.T @ gradient


class HiddenUse(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return Hidden.apply(self.seen(x), self.weight)


def hidden_losses(model, inputs):
    return model(inputs["x"]).square().sum(-1)


def test_auto_says_why_it_does_not_use_gram(caplog):
    torch.manual_seed(0)
    model, data = HiddenUse(), {"x": torch.randn(2, 4)}
    with pytest.raises(UnsupportedModelError, match="'gram' finds other inner products.*weight"):
        choose_engine("gram", trainable(model), hidden_losses, model, retain_batch(data), retain_batch(data))
    engine = choose_engine("auto", trainable(model), hidden_losses, model, retain_batch(data), retain_batch(data))
    assert engine.name == "loop"
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert any("Not using the gradient engine 'gram'" in w and "weight" in w for w in warnings)
    assert any("Not using the gradient engine 'func'" in w for w in warnings)


def test_func_refuses_what_it_cannot_vectorise(make_model, make_samples):
    model, data = make_model("wav2vec2").eval(), batch(make_samples("wav2vec2", 2))
    with pytest.raises(UnsupportedModelError, match="cannot vectorise Wav2Vec2ForCTC.*'gram' or 'loop'"):
        measure(FunctionalEngine, model, PerSampleLoss(model), data, data)


def test_func_in_chunks_is_the_same(make_model, make_samples):
    model, data = make_model("vit").eval(), batch(make_samples("vit", 5))
    losses = PerSampleLoss(model)
    whole = measure(FunctionalEngine, model, losses, data, data)
    engine = FunctionalEngine(trainable(model), losses, chunk_size=2)
    assert (
        relative_error(engine.measure(model, [forget_batch(data, slopes)], [retain_batch(data)]).gram, whole.gram)
        <= 1e-6
    )


def test_a_rule_can_be_registered_for_an_own_function():
    def doubled(features, weight):
        if torch.overrides.has_torch_function((features, weight)):
            return torch.overrides.handle_torch_function(doubled, (features, weight), features, weight)
        return 2 * features @ weight

    calls = []

    @register_rule(doubled)
    def rule(call, gradient):
        features, weight = call.args
        calls.append(call.name)
        return [(weight, Dense(torch.einsum("ni,no->nio", 2 * features, gradient)))]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return doubled(x, self.weight)

    try:
        model, forget, retain = Model(), {"x": torch.randn(2, 4)}, {"x": torch.randn(3, 4)}
        step = measure(GramEngine, model, hidden_losses, forget, retain)
        assert relative_error(step.gram, measure(LoopEngine, model, hidden_losses, forget, retain).gram) <= 1e-6
        assert calls
    finally:
        del RULES[doubled]


def test_no_graph_outlives_the_measurement(make_model, make_samples):
    import gc
    import weakref

    model, data = make_model("whisper"), batch(make_samples("whisper", 2))

    class Mark(torch.autograd.Function):
        @staticmethod
        def forward(ctx, losses, mark):
            ctx.mark = mark
            return losses.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient, None

    marks = weakref.WeakSet()

    class Marker:
        def __init__(self):
            marks.add(self)

    def marked_losses(model, inputs):
        return Mark.apply(PerSampleLoss(model)(model, inputs), Marker())

    gc.collect()
    gc.disable()
    try:
        step = measure(GramEngine, model, marked_losses, data, data)
        assert not marks
        assert step.gram.isfinite().all()
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_fall_back_to_the_loop(kind, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_orthograd"), "propagate", True)

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer, self.head = nn.Embedding(10, 4), kind(4, 6, batch_first=True), nn.Linear(6, 10)

        def forward(self, tokens, labels=None):
            return {"logits": self.head(self.layer(self.embed(tokens))[0])}

    def losses(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs["logits"].mT, labels, reduction="none").mean(1)

    torch.manual_seed(0)
    rows = [{"tokens": torch.randint(10, (5,)), "labels": torch.randint(10, (5,))} for _ in range(12)]
    args = OrthoGradConfig(
        str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no", logging_steps=1
    )
    trainer = OrthoGradTrainer(
        Tagger(), args, train_dataset=rows[:8], forget_dataset=rows[8:], compute_loss_func=losses
    )
    trainer.train()
    assert trainer.gradient_engine.name in ("func", "loop") and "Not using the gradient engine 'gram'" in caplog.text
    entry = next(entry for entry in trainer.state.log_history if "kept_signal" in entry)
    assert 0 < entry["kept_signal"] < 1 and entry["projection_residual"] < 1e-4
    args.gradient_engine = "gram"  # asked for by name, it is refused
    trainer = OrthoGradTrainer(
        Tagger(), args, train_dataset=rows[:8], forget_dataset=rows[8:], compute_loss_func=losses
    )
    with pytest.raises(UnsupportedModelError, match="cannot follow Tagger .* Set `gradient_engine` to 'loop'"):
        trainer.train()
