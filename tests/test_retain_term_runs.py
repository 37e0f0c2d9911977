"""Whole runs beside the starting model: logged, resumed, with predictions found once, and with other settings."""

import copy
import weakref

import pytest
import torch
import transformers
from conftest import MODELS, Samples
from equations import batch_of
from launched import settings, train
from torch.utils.data import default_collate
from transformers import GPT2Config, GPT2ForSequenceClassification
from transformers.utils import ModelOutput

from hf_orthograd import OrthoGradTrainer
from hf_orthograd.data import Batch
from hf_orthograd.objectives import PerSampleLoss, kl_divergence
from hf_orthograd.parallel import ALONE
from hf_orthograd.preparation import StartingModel, StoredPredictions, stored_predictions


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


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        *(
            ("vit", more)
            for more in ({}, {"projection": "none"}, {"retain_chunk_size": 3}, {"gradient_engine": "func"})
        ),
        *((kind, {}) for kind in ("llama", "whisper")),
        ("llama", {"ragged": True}),  # padded as the batch is
    ],
)
def test_predictions_found_once_make_the_same_run(kind, more, tmp_path):
    """The starting model runs on the retain set before the first step and no more, also where a run goes on."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    expected = train(tmp_path, kind, False, settings(8, **KL, **more, max_steps=4))
    found = train(tmp_path / "stored", kind, False, settings(8, **STORED, **more, **saving))
    for name, parameter in end_of(expected).items():  # the bias of keys has no gradient but rounding
        assert (end_of(found)[name] - parameter).norm() <= 1e-5 * parameter.norm() + 1e-7, name
    checkpoint = str(tmp_path / "stored" / "checkpoint-2")
    resumed = train(tmp_path, kind, False, settings(8, **STORED, **more, max_steps=4), resume=checkpoint)
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


def test_predictions_that_memory_has_no_room_for_are_refused_first(tmp_path, monkeypatch):
    """A table of five classes, 4 bytes each, beside what has been found."""
    rows = len(train(tmp_path, "vit", False, settings(8, **STORED, max_steps=1)).train_dataset)
    needed = rows * 5 * 4
    monkeypatch.setattr(stored_predictions, "free_memory", lambda device: needed)
    train(tmp_path, "vit", False, settings(8, **STORED, max_steps=1))
    monkeypatch.setattr(stored_predictions, "free_memory", lambda device: needed - 1)
    monkeypatch.setattr(OrthoGradTrainer, "training_step", None)  # no step is made
    with pytest.raises(ValueError, match=f"the table of {rows} labels that were read so far takes"):
        train(tmp_path, "vit", False, settings(8, **STORED, max_steps=1))


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


class Shortened(Samples):
    """From some reading on every sample has a label less."""

    since = None

    def __getitem__(self, row):
        example = dict(self.examples[row])
        if self.since is not None:
            example["labels"] = example["labels"].clone()
            example["labels"][-5:] = -100
        return example


def test_a_run_stops_where_a_sample_has_other_labels_than_its_predictions(tmp_path):
    base = train(tmp_path, "llama", False, settings(8, **STORED, max_steps=1))
    retain, dataset = Shortened(base.train_dataset.examples), base.forget_dataset

    class Shortens(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            retain.since = state.global_step if state.global_step >= 1 else None

    base.args.max_steps, base.args.dataloader_num_workers = 4, 0
    trainer = OrthoGradTrainer(
        MODELS["llama"](), base.args, train_dataset=retain, forget_dataset=dataset, callbacks=[Shortens()]
    )
    with pytest.raises(FloatingPointError, match="with another number of labels than they had"):
        trainer.train()
    assert 1 <= trainer.state.global_step <= 3


def test_rows_that_two_processes_read_otherwise_have_no_predictions():
    class Beside:
        """Another process that read the same rows, one label shorter."""

        is_alone, num_processes = False, 2

        def sum(self, tensor):
            return tensor + torch.tensor([[2, 5], [1, 1]]) if tensor.shape == (2, 2) else tensor

        def gather_numbers(self, *numbers, device):
            return [list(numbers)] * 2

    model = MODELS["llama"]()
    losses = PerSampleLoss(model)
    ids = torch.ones(2, 6, dtype=torch.long)
    batch = Batch({"input_ids": ids, "labels": ids}, 2, rows=torch.arange(2))
    with pytest.raises(ValueError, match="rows of `train_dataset` have other labels when they are read again"):
        StoredPredictions.find(lambda batch: model(batch.inputs["input_ids"]), losses, [batch], 2, Beside())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_predictions_are_kept_in_the_precision_in_which_they_were_computed(dtype):
    """accelerate casts what mixed precision computed to float32; the copy that is kept is half as large, and the same."""
    model = MODELS["llama"]()
    ids = torch.arange(1, 13).view(2, 6)
    batch = Batch({"input_ids": ids, "labels": ids}, 2, rows=torch.arange(2))
    logits = model(ids).logits.detach().to(dtype).float()
    answer = ModelOutput(logits=logits)
    stored = StoredPredictions.find(lambda batch: answer, PerSampleLoss(model), [batch], 2, ALONE)
    found = stored.outputs(PerSampleLoss(model), batch).logits
    assert found.dtype == dtype and torch.equal(found[:, :5].float(), logits[:, :5])


def test_a_ref_model_goes_back_where_it_was(tmp_path, monkeypatch):
    base, moves = train(tmp_path, "vit", False, settings(8, **STORED, max_steps=1)), []
    weights, held = MODELS["vit"]().state_dict(), MODELS["vit"]().to("meta")

    def move(place):
        moves.append(torch.device(place).type)
        if moves[-1] == "cpu":
            held.to_empty(device="cpu").load_state_dict(weights)
        return held

    monkeypatch.setattr(held, "to", move)
    sets = {"train_dataset": base.train_dataset, "forget_dataset": base.forget_dataset}
    OrthoGradTrainer(MODELS["vit"](), base.args, ref_model=held, **sets).train()
    assert moves == ["cpu", "meta"]


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
    with pytest.raises(
        ValueError, match="for classifiers of samples and of tokens, but the model is a Wav2Vec2ForCTC"
    ):
        make(MODELS["wav2vec2"](), check_overlap=False)
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
