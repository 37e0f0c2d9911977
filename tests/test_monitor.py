"""What the monitor logs of the steps, against an independent account of them."""

import logging

import pytest
import torch
from conftest import Samples
from transformers import TrainerCallback

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.callbacks import show_one_bar


K = 4


class Account(TrainerCallback):
    """Mean change of the retain losses in each step, by the model's own loss, one sample at a time."""

    def __init__(self, model, retain):
        self.model, self.retain, self.changes, self.rises, self.largest = model, retain, [], [], []

    @torch.no_grad()
    def losses(self):
        training = self.model.training
        self.model.eval()
        found = [self.model(**{key: value[None] for key, value in sample.items()}).loss for sample in self.retain]
        self.model.train(training)
        return torch.stack(found).double()

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = self.losses()

    def on_step_end(self, args, state, control, **kwargs):
        change = self.losses() - self.before
        self.changes.append(change.mean().item())
        self.rises.append((change > 1e-6 * self.before.abs()).double().mean().item())
        self.largest.append(change.max().item())


def monitored_run(tmp_path, model, kind, make_samples, callbacks=(), **settings):
    retain, forget = make_samples(kind, K, seed=1), make_samples(kind, 3, seed=2)
    defaults = {
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": K,
        "per_device_forget_batch_size": 3,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    args = OrthoGradConfig(str(tmp_path), **(defaults | settings))
    trainer = OrthoGradTrainer(model, args, train_dataset=retain, forget_dataset=forget, callbacks=list(callbacks))
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("engine", ["gram", "loop"])
@pytest.mark.parametrize("kind", ["whisper", "vit", "llama"])
def test_change_is_what_the_losses_did_and_nearly_what_was_predicted(kind, engine, tmp_path, make_model, make_samples):
    model = make_model(kind)
    account = Account(model, make_samples(kind, K, seed=1))
    _, logs = monitored_run(tmp_path, model, kind, make_samples, [account], gradient_engine=engine)
    assert len(logs) == 4
    for entry, change, rises, largest in zip(logs, account.changes, account.rises, account.largest, strict=True):
        assert entry["largest_retain_rise"] == pytest.approx(largest, abs=1e-6)
        assert entry["retain_change"] == pytest.approx(change, abs=1e-6)
        assert entry["retain_change_predicted"] == pytest.approx(change, rel=0.1, abs=1e-5)
        assert abs(change) > 1e-4 and entry["retain_rises"] == rises


def test_prediction_is_of_the_step_that_the_optimizer_made(tmp_path, make_model, make_samples):
    """With AdamW, and corrected: alpha = 0 leaves nothing to first order."""
    run = {"optim": "adamw_torch", "learning_rate": 1e-4, "alpha": 0.0}
    _, logs = monitored_run(tmp_path, make_model("vit"), "vit", make_samples, **run)
    gradient = [abs(entry["retain_change_predicted"]) for entry in logs]
    assert [entry["retain_change"] for entry in logs] == pytest.approx(
        [entry["retain_change_predicted"] for entry in logs], rel=0.2, abs=1e-5
    )
    _, logs = monitored_run(tmp_path, make_model("vit"), "vit", make_samples, projection_target="update", **run)
    assert max(abs(entry["retain_change_predicted"]) for entry in logs) < 1e-2 * min(gradient)


def test_watching_changes_nothing(tmp_path, make_model, make_samples):
    ends = []
    for steps in (0, 1):
        trainer, logs = monitored_run(
            tmp_path, make_model("llama", dropout=0.1), "llama", make_samples, monitor_steps=steps
        )
        ends.append([p.detach() for p in trainer.model.parameters()])
        assert all(("retain_change" in entry) == bool(steps) for entry in logs)
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_first_step_and_every_nth_are_watched(tmp_path, make_model, make_samples):
    settings = {"max_steps": 7, "monitor_steps": 3}
    _, logs = monitored_run(tmp_path, make_model("vit"), "vit", make_samples, **settings)
    assert [entry["step"] for entry in logs if "retain_change" in entry] == [1, 3, 6]


@pytest.mark.parametrize("settings", [{"projection": "none"}, {"gradient_checkpointing": True}])
def test_without_kept_gradients_nothing_is_predicted(settings, tmp_path, make_model, make_samples):
    _, logs = monitored_run(tmp_path, make_model("llama"), "llama", make_samples, **settings)
    assert all("retain_change" in entry and "retain_change_predicted" not in entry for entry in logs[1:])


@pytest.mark.parametrize(
    ("rows", "message"), [("same", "next to nothing is forgotten"), ("other", "doing next to nothing")]
)
def test_projection_that_does_nothing_or_everything_is_warned_of(rows, message, tmp_path, make_model, caplog):
    """What the retain sample says is taken out; one that shares no word with the forget set leaves it alone."""

    def sentence(tokens):
        ids = torch.tensor(tokens)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    forget = Samples([sentence([5, 6, 7, 8, 9, 10])])
    # longer by a token that is masked: the same gradient in another row
    near = sentence([5, 6, 7, 8, 9, 10, 0])
    near["labels"] = torch.tensor([5, 6, 7, 8, 9, 10, -100])
    retain = Samples([near] if rows == "same" else [sentence([40, 50, 51, 52, 53, 54])])
    model = make_model("llama")
    if rows == "other":  # the vocabulary alone is trained: sentences of other words have gradients of their own
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "embed_tokens" in name
    args = OrthoGradConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=1, per_device_forget_batch_size=1, report_to="none",
        save_strategy="no", logging_steps=1, learning_rate=1e-4, disable_tqdm=True, alpha=0.0,
    )  # fmt: skip
    trainer = OrthoGradTrainer(model, args, train_dataset=retain, forget_dataset=forget)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert sum(message in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_one_bar_carries_the_losses(make_model, make_samples, tmp_path, capfd, disable_tqdm):
    args = OrthoGradConfig(
        str(tmp_path), max_steps=3, logging_steps=1, report_to="none", disable_tqdm=disable_tqdm, use_cpu=True,
        eval_strategy="steps", eval_steps=1, save_strategy="no",
    )  # fmt: skip
    samples = [make_samples("vit", 4, seed) for seed in range(3)]
    sets = {"train_dataset": samples[0], "forget_dataset": samples[1], "eval_dataset": samples[2]}
    show_one_bar(OrthoGradTrainer(make_model("vit"), args, **sets)).train()
    out, err = capfd.readouterr()
    if disable_tqdm:  # then Trainer prints, as it did
        assert "{'loss'" in out and "|" not in err
        return
    assert "{" not in out and "forget=" in err and "retain=" in err and "kept=" in err
    assert "3/3" in err and "1/1" not in err  # the evaluations' own bars
