"""What is descended on retain samples in place of their labels' loss: the change of predictions since the start."""

import copy

import pytest
import torch
import transformers
from conftest import MODELS
from engines import forget_batch, retain_batch
from equations import batch_of
from packaging.version import Version
from peft import LoraConfig, get_peft_model

from hf_orthograd.gradients import FunctionalEngine, GramEngine, LoopEngine, MeanEngine, PlainEngine
from hf_orthograd.objectives import PerSampleLoss
from hf_orthograd.parallel import Parameters
from hf_orthograd.preparation import KeepPredictions, StartingModel
from hf_orthograd.projection import project_orthogonal, solve_projections, update_weights


ALPHA = 0.3
ENGINES = {
    "gram": GramEngine,
    "gram, gradients kept": lambda *args: GramEngine(*args, needs_gradients=True),
    "gram, in chunks": lambda *args: GramEngine(*args, chunk_size=2),
    "loop": LoopEngine,
    "func": FunctionalEngine,
}
# by torch.func: masks, and before transformers 5.23 a draw that skips layers of Whisper
UNFOLLOWED = {"wav2vec2", "llama"} | ({"whisper"} if Version(transformers.__version__) < Version("5.23") else set())


def make_moved(kind, lora, dropout=0.0):
    """A model some way from where it started, and a copy of that start."""
    torch.manual_seed(0)
    model = MODELS[kind](dropout)
    if lora:
        adapter = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        model = get_peft_model(model, LoraConfig(**adapter))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first, start = copy.deepcopy(model).eval(), StartingModel(model)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.5 * parameter.std().nan_to_num(0.1) * torch.randn_like(parameter))
    return model.train(), first, start, Parameters(trained, {})


def plain_divergence(kind, model, first, example):
    """KL(start || model) of one sample, term by term, over the positions that its labels or frames count."""
    inputs = {name: value[None] for name, value in example.items()}
    now, before = model(**inputs).logits[0], first(**inputs).logits[0].detach()
    labels = example["labels"]
    if kind == "whisper":
        now, before = now[labels != -100], before[labels != -100]
    elif kind == "llama":
        now, before = now[:-1][labels[1:] != -100], before[:-1][labels[1:] != -100]
    elif kind == "wav2vec2":
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        frames = base._get_feat_extract_output_lengths(example["attention_mask"].sum())
        now, before = now[:frames], before[:frames]
    old, new = before.softmax(-1), now.softmax(-1)
    return (old * (old.log() - new.log())).sum(-1).mean()


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.fixture
def plain_update(loop_gradients):
    """`alpha * (gradient of the mean KL) - (1 - alpha) * g_perp`, all by one sample and one backward pass at a time."""

    def compute(kind, model, first, forget, retain):
        trained = [p for p in model.parameters() if p.requires_grad]
        of_forget, of_retain = loop_gradients(model, forget).mean(0), loop_gradients(model, retain)
        divergence = torch.stack([plain_divergence(kind, model, first, example) for example in retain]).mean()
        of_divergence = flat(torch.autograd.grad(divergence, trained, materialize_grads=True))
        projected = project_orthogonal(of_forget.double(), of_retain.double())
        return ALPHA * of_divergence.double() - (1 - ALPHA) * projected, divergence.item()

    return compute


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_every_engine_makes_the_update_of_plain_backward_passes(kind, lora, make_samples, plain_update):
    forget, retain = make_samples(kind, 3, seed=2), make_samples(kind, 5, seed=1)
    model, first, start, parameters = make_moved(kind, lora)
    expected, divergence = plain_update(kind, model, first, forget, retain)
    assert divergence > 1e-5
    losses = PerSampleLoss(model)
    for name, make_engine in ENGINES.items():
        if name == "func" and kind in UNFOLLOWED:
            continue
        engine, batches = (
            make_engine(parameters, losses),
            ([forget_batch(batch_of(forget))], [retain_batch(batch_of(retain))]),
        )
        step = engine.measure(model, *batches, retain_term=KeepPredictions(start, losses))
        projection = solve_projections(step.grams)
        combination = step.combine(update_weights(ALPHA, projection, parameters.projected, has_term=True))
        found = flat(torch.autograd.grad(combination, list(parameters.trainable.values()), materialize_grads=True))
        assert (found - expected).norm() <= 1e-5 * expected.norm(), name
        assert step.retain_terms.mean().item() == pytest.approx(divergence, rel=1e-4, abs=1e-8), name


@pytest.mark.parametrize("engine_class", [PlainEngine, MeanEngine])
def test_the_term_stands_beside_other_projections(engine_class, make_samples):
    forget, retain = make_samples("vit", 3, seed=2), make_samples("vit", 5, seed=1)
    model, first, start, parameters = make_moved("vit", False)
    losses = PerSampleLoss(model)
    batches = [forget_batch(batch_of(forget))], [retain_batch(batch_of(retain))]
    step = engine_class(parameters, losses).measure(model, *batches, retain_term=KeepPredictions(start, losses))
    projection = solve_projections(step.grams) if step.grams else None
    combination = step.combine(update_weights(ALPHA, projection, parameters.projected, has_term=True))
    trained = list(parameters.trainable.values())
    found = flat(torch.autograd.grad(combination, trained, materialize_grads=True))
    g_u, mean = (
        flat(torch.autograd.grad(losses(model, batch_of(own)).mean(), trained, materialize_grads=True))
        for own in (forget, retain)
    )
    divergence = torch.stack([plain_divergence("vit", model, first, example) for example in retain]).mean()
    term = flat(torch.autograd.grad(divergence, trained, materialize_grads=True))
    kept = g_u if engine_class is PlainEngine else g_u - (g_u @ mean) / (mean @ mean) * mean
    expected = ALPHA * term - (1 - ALPHA) * kept
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_forward_pass_of_the_start_changes_nothing(make_samples):
    """Parameters, statistics, modes and random numbers are as they were; what it answers is what the start answers."""
    model, first, start, _ = make_moved("wav2vec2", False, dropout=0.2)
    before, inputs = copy.deepcopy(model.state_dict()), batch_of(make_samples("wav2vec2", 2))
    torch.manual_seed(3)
    answered = start.run(lambda own: own(**{k: v for k, v in inputs.items() if k != "labels"}).logits)
    drawn = torch.rand(1)
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
    assert all(module.training for module in model.modules())
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert not torch.equal(answered, first(**inputs).logits)  # it masks what it reads, as the model does


def test_the_start_reads_what_the_model_reads(make_samples):
    """SpecAugment's masks are the same for both: a model that has not moved has not diverged."""
    torch.manual_seed(0)
    model = MODELS["wav2vec2"]()
    model.config.apply_spec_augment = True
    model.train()
    losses, batch = PerSampleLoss(model), retain_batch(batch_of(make_samples("wav2vec2", 4)))
    term = KeepPredictions(StartingModel(model), losses)
    first, divergences = term(model, batch)
    again, _ = term(model, batch)
    assert divergences.abs().max() < 1e-6
    assert (first - again).abs().max() > 1e-3  # and masks differ from pass to pass


def test_batch_norm_of_the_start_has_its_statistics():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    inputs, first = torch.randn(6, 3), copy.deepcopy(model).eval()
    start = StartingModel(model)
    for _ in range(3):
        model(inputs + 5)
    assert torch.equal(start.run(lambda own: own(inputs)), first(inputs))
    assert not torch.equal(model[1].running_mean, first[1].running_mean)
