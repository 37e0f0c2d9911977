"""What is descended on retain samples in place of their labels' loss: the change of predictions since the start."""

import copy
import weakref

import pytest
import torch
import transformers
from conftest import MODELS
from engines import forget_batch, retain_batch
from launched import settings, train
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch.utils.data import default_collate
from transformers import GPT2Config, GPT2ForSequenceClassification

from hf_orthograd import OrthoGradTrainer
from hf_orthograd.gradients import FunctionalEngine, GramEngine, LoopEngine, MeanEngine, PlainEngine
from hf_orthograd.objectives import PerSampleLoss, kl_divergence
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


def batch_of(samples):
    return default_collate([samples[index] for index in range(len(samples))])


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


# ---- Whole runs ----

KL = {"retain_loss": "kl", "alpha": 0.7, "learning_rate": 0.5}


def end_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def apart(one, other):
    return max((one[name] - other[name]).norm() / other[name].norm() for name in other)


def test_a_run_logs_its_divergence_and_resumes_beside_the_same_start(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = train(tmp_path, "vit", False, settings(8, **KL, **saving))
    logged = [entry["retain_divergence"] for entry in whole.state.log_history if "retain_divergence" in entry]
    assert logged[0] < 1e-6 < logged[1] < logged[3]
    resumed = train(tmp_path, "vit", False, settings(8, **KL, **saving), resume=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(own, end_of(whole)[name]) for name, own in end_of(resumed).items())
    checkpoint = type(whole.model).from_pretrained(tmp_path / "checkpoint-2")
    for model, ref_model, named in ((checkpoint, None, "model"), (MODELS["vit"](), MODELS["vit"](), "ref_model")):
        sets = {"train_dataset": whole.train_dataset, "forget_dataset": whole.forget_dataset}
        trainer = OrthoGradTrainer(model, whole.args, ref_model=ref_model, **sets)
        with pytest.raises(
            ValueError, match=f"those of the `{named}` that the run began with, but this one is another"
        ):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    other = train(tmp_path / "nll", "vit", False, settings(8, **saving))
    with pytest.raises(ValueError, match="saved with another `retain_loss`"):
        train(tmp_path, "vit", False, settings(8, **KL, **saving), resume=str(tmp_path / "nll" / "checkpoint-2"))
    assert apart(end_of(other), end_of(whole)) > 1e-3


def test_a_second_training_holds_on_to_where_it_starts(tmp_path):
    trainer = train(tmp_path, "vit", False, settings(8, **KL))
    trainer.train()
    logged = [entry["retain_divergence"] for entry in trainer.state.log_history if "retain_divergence" in entry]
    assert logged[0] < 1e-6


def test_a_run_holds_on_to_another_model(tmp_path):
    """Its predictions take the place of the start's; of the start's own weights it is the same run."""
    base = train(tmp_path, "vit", False, settings(8, **KL))
    sets = {"train_dataset": base.train_dataset, "forget_dataset": base.forget_dataset}

    def run(ref_model, **changes):
        args = copy.copy(base.args)
        for name, value in changes.items():
            setattr(args, name, value)
        torch.manual_seed(0)
        trainer = OrthoGradTrainer(MODELS["vit"](), args, ref_model=ref_model, **sets)
        trainer.train()
        return trainer

    def seeded():
        torch.manual_seed(0)
        return MODELS["vit"]()

    assert apart(end_of(run(seeded())), end_of(run(None))) < 1e-6
    other = seeded()
    with torch.no_grad():
        other.classifier.bias += torch.arange(5.0)
    held = run(other, max_steps=1, logging_steps=1)
    inputs = batch_of(base.train_dataset)
    before, start = (model.eval()(**inputs).logits.detach() for model in (other, seeded()))
    expected = kl_divergence(start[:, None], before[:, None], torch.ones(len(start), 1)).mean().item()
    logged = next(entry["retain_divergence"] for entry in held.state.log_history if "retain_divergence" in entry)
    assert expected > 0.1 and logged == pytest.approx(expected, rel=0.5)  # of the step's eight samples
    assert not any(parameter.requires_grad for parameter in other.parameters())
    assert held.estimate().memory > 0
    model = MODELS["vit"]()
    with pytest.raises(ValueError, match="`ref_model` is the model that is trained"):
        OrthoGradTrainer(model, base.args, ref_model=model, **sets)
    args = copy.copy(base.args)
    args.retain_loss = "nll"
    with pytest.raises(ValueError, match="`ref_model` is given, but `retain_loss` is 'nll'"):
        OrthoGradTrainer(model, args, ref_model=other, **sets)


STORED = KL | {"precompute_ref_logits": True}


@pytest.mark.parametrize("more", [{}, {"projection": "none"}, {"retain_chunk_size": 3}, {"gradient_engine": "func"}])
def test_predictions_found_once_make_the_same_run(more, tmp_path):
    """The starting model runs on the retain set before the first step and no more, also where a run goes on."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    expected = train(tmp_path, "vit", False, settings(8, **KL, **more, max_steps=4))
    found = train(tmp_path / "stored", "vit", False, settings(8, **STORED, **more, **saving))
    for name, parameter in end_of(expected).items():  # the bias of keys has no gradient but rounding
        assert (end_of(found)[name] - parameter).norm() <= 1e-5 * parameter.norm() + 1e-7, name
    checkpoint = str(tmp_path / "stored" / "checkpoint-2")
    resumed = train(tmp_path, "vit", False, settings(8, **STORED, **more, max_steps=4), resume=checkpoint)
    assert all(torch.equal(own, end_of(found)[name]) for name, own in end_of(resumed).items())


def test_predictions_found_once_leave_no_starting_model(tmp_path, monkeypatch):
    """Neither a copy of what is trained nor a forward pass of it outlives the first step's preparation."""
    starts, runs = [], []
    monkeypatch.setattr(StartingModel, "__init__", _noting(StartingModel.__init__, starts))
    monkeypatch.setattr(StartingModel, "run", _noting(StartingModel.run, runs))

    class Looks(transformers.TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_step_begin(self, args, state, control, **kwargs):
            self.seen.append((starts[0]() is not None, len(runs)))

    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = train(tmp_path, "vit", False, settings(8, **STORED, **saving, max_steps=1))
    looks, sets = Looks(), {"train_dataset": trainer.train_dataset, "forget_dataset": trainer.forget_dataset}
    torch.manual_seed(0)
    again = OrthoGradTrainer(MODELS["vit"](), trainer.args, **sets, callbacks=[looks])
    starts.clear(), runs.clear()
    again.args.max_steps = 4
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert len(looks.seen) == 3 and len(set(looks.seen)) == 1 and looks.seen[0][1] > 0
    alive, _ = looks.seen[0]
    assert not alive and len(starts) == 1
    copied = sum(parameter.nbytes for parameter in again.model.parameters() if parameter.requires_grad)
    found = again.estimate()
    again.args.precompute_ref_logits = False
    usual = again.estimate()
    assert usual.memory - found.memory == copied - len(trainer.train_dataset) * 5 * 4
    assert usual.relative_time > found.relative_time


def _noting(method, noted):
    def noting(self, *args):
        noted.append(weakref.ref(self))
        return method(self, *args)

    return noting


@pytest.mark.parametrize("more", [{}, {"precompute_ref_logits": True}])
def test_a_smaller_batch_size_begins_again_beside_the_same_start(more, tmp_path, monkeypatch):
    """A run that goes on from a checkpoint, and runs out of memory at its first step."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = train(tmp_path, "vit", False, settings(8, **KL, **saving))
    torch.manual_seed(0)
    args, failures = copy.copy(whole.args), [torch.cuda.OutOfMemoryError("CUDA out of memory.")]
    args.auto_find_batch_size = True
    for name, value in more.items():
        setattr(args, name, value)
    trainer = OrthoGradTrainer(
        MODELS["vit"](), args, train_dataset=whole.train_dataset, forget_dataset=whole.forget_dataset
    )
    step = OrthoGradTrainer.training_step

    def fails_once(self, *inputs):
        if failures:
            raise failures.pop()
        return step(self, *inputs)

    monkeypatch.setattr(OrthoGradTrainer, "training_step", fails_once)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    logged = [entry["retain_divergence"] for entry in trainer.state.log_history if "retain_divergence" in entry]
    assert trainer.state.global_step == 4 and not failures and logged[-1] > 1e-6


class Varying(torch.utils.data.Dataset):
    """Some rows have other pixels at some readings."""

    def __init__(self, dataset):
        self._dataset = dataset

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, row):
        example = self._dataset[row]
        flipped = row % 2 and torch.rand(()) < 0.5
        return example | {"pixel_values": example["pixel_values"].flip(-1) if flipped else example["pixel_values"]}


class PadLeft:
    """Tokens of unequal lengths, and no mask that would say so."""

    def __call__(self, examples):
        longest = max(len(example["input_ids"]) for example in examples)
        padded = [[1] * (longest - len(own["input_ids"])) + own["input_ids"] for own in examples]
        return {"input_ids": torch.tensor(padded), "labels": torch.tensor([own["labels"] for own in examples])}


def test_what_varies_is_not_found_once(tmp_path):
    base = train(tmp_path, "vit", False, settings(8, **STORED, max_steps=1))

    def make(model=None, dataset=None, collator=default_collate, ref_model=None, forget=None, **changes):
        args = copy.copy(base.args)
        for name, value in changes.items():
            setattr(args, name, value)
        dataset = base.train_dataset if dataset is None else dataset
        sets = {"train_dataset": dataset, "forget_dataset": base.forget_dataset if forget is None else forget}
        model = MODELS["vit"]() if model is None else model
        return OrthoGradTrainer(model, args, **sets, data_collator=collator, ref_model=ref_model)

    with pytest.raises(ValueError, match="answers otherwise when rows of `train_dataset` are read again"):
        make(dataset=Varying(base.train_dataset), check_overlap=False).train()
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, num_labels=3, pad_token_id=0)
    texts = [
        {"input_ids": [2 + (row * 7 + n) % 30 for n in range(3 + row % 5)], "labels": row % 3} for row in range(24)
    ]
    with pytest.raises(ValueError, match="padding or masks change what it answers"):
        make(GPT2ForSequenceClassification(config), texts, PadLeft(), forget=texts, check_overlap=False).train()
    with pytest.raises(ValueError, match="`retain_loss` is 'nll' with `alpha` 0.7, which uses no predictions"):
        make(retain_loss="nll")
    with pytest.raises(ValueError, match="for classifiers of whole samples, but the model is a LlamaForCausalLM"):
        make(MODELS["llama"](), check_overlap=False)
    later = make(precompute_ref_logits=False)
    later.args.precompute_ref_logits, later.train_dataset = True, Stream()
    with pytest.raises(ValueError, match="`train_dataset` is a stream"):
        later.train()
    other = MODELS["vit"]()
    held = make(ref_model=other, max_steps=1)  # other predictions are stored alike
    held.train()
    entry = next(entry for entry in held.state.log_history if "retain_divergence" in entry)
    assert entry["retain_divergence"] > 1e-6


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield {"pixel_values": torch.zeros(3, 32, 32), "labels": torch.tensor(0)}


@pytest.mark.parametrize("more", [{"projection_target": "update"}, {"projection": "none"}, {"retain_chunk_size": 3}])
def test_other_settings_hold_on_too(more, tmp_path):
    """The change of predictions is smaller than without the term."""
    held = train(tmp_path, "vit", False, settings(8, **KL | more, max_steps=8))
    logged = [entry for entry in held.state.log_history if "retain_divergence" in entry]
    assert len(logged) == 8 and logged[-1]["retain_divergence"] > 0
    start = train(tmp_path, "vit", False, settings(8, learning_rate=0.0, max_steps=1))
    free = train(tmp_path, "vit", False, settings(8, **KL | more | {"alpha": 0.0, "retain_loss": "nll"}, max_steps=8))
    inputs = batch_of(held.train_dataset)
    before, kept, lost = (run.model.eval()(**inputs).logits.detach() for run in (start, held, free))
    apart_now = [kl_divergence(own[:, None], before[:, None], torch.ones(24, 1)).mean() for own in (kept, lost)]
    assert apart_now[0] < 0.9 * apart_now[1]


def test_a_divergence_of_the_users_own(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")

    def divergence(outputs, start_outputs, labels):
        return (outputs.logits - start_outputs.logits).square().mean(-1)

    base = train(tmp_path, "vit", False, settings(8, max_steps=1))
    sets = {"train_dataset": base.train_dataset, "forget_dataset": base.forget_dataset}
    args = copy.copy(base.args)
    args.retain_loss, args.max_steps = "kl", 2
    with pytest.raises(ValueError, match="Pass `compute_divergence_func"):
        OrthoGradTrainer(MODELS["vit"](), args, compute_loss_func=loss, **sets)
    trainer = OrthoGradTrainer(
        MODELS["vit"](), args, compute_loss_func=loss, compute_divergence_func=divergence, **sets
    )
    trainer.train()
    logged = [entry["retain_divergence"] for entry in trainer.state.log_history if "retain_divergence" in entry]
    assert logged[0] == 0 < logged[1]


@pytest.mark.parametrize(
    "more", [{"fp16": True, "scaling": {"init_scale": 2.0**14}}, {"gradient_checkpointing": True}]
)
def test_half_precision_and_checkpointing_go_the_same_way(more, tmp_path):
    start = train(tmp_path, "llama", False, settings(8, learning_rate=0.0, max_steps=1))
    plain, found = (train(tmp_path, "llama", False, settings(8, **KL | own)) for own in ({}, more))
    begin, end, other = (torch.cat([p.flatten() for p in end_of(run).values()]) for run in (start, plain, found))
    assert (other - end).norm() < (1e-5 if "fp16" not in more else 3e-3) * (end - begin).norm()
