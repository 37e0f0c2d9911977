"""Training on after unlearning: what was forgotten is watched, and held."""

import numpy as np
import pytest
import torch
from published import rows
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hf_orthograd import OrthoGradTrainer
from hf_orthograd.objectives import PerSampleLoss
from hf_orthograd.requests import RequestHistory, StaysForgotten


@pytest.fixture
def train_on(make_model, make_samples, tmp_path):
    """Trains a model on new rows and on the forgotten ones, beside callbacks; returns it and the forgotten rows' loss."""

    def train(forgotten, callbacks, *, others=8, steps=30, resume=None, save_strategy="no", **config):
        model = make_model("vit")
        new = [rows(make_samples("vit", others, seed=5))] if others else []
        everything = torch.utils.data.ConcatDataset([forgotten, *new])
        args = TrainingArguments(
            str(tmp_path / "trained"), max_steps=steps, learning_rate=3e-3, per_device_train_batch_size=4, report_to="none",
            disable_tqdm=True, use_cpu=True, save_strategy=save_strategy, remove_unused_columns=False, **config,
        )  # fmt: skip
        # without a forget set it is Trainer, but for weights that have other names in files
        OrthoGradTrainer(model, args, train_dataset=everything, callbacks=list(callbacks)).train(resume)
        return model, PerSampleLoss(model)(model.eval(), collated(forgotten)).mean().item()

    return train


def collated(dataset):
    return {name: torch.stack([row[name] for row in dataset]) for name in ("pixel_values", "labels")}


class KeepGradients(TrainerCallback):
    """Each parameter's gradient before the optimizer's step."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.found = [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("level", [0.1, 9.0, [9.0, 0.1, 9.0, 0.1]])
def test_the_gradient_is_projected_and_lifted(level, train_on, make_model, make_samples):
    """For rows at their level or below; of those above it nothing is kept."""
    forgotten, before, after = rows(make_samples("vit", 4, seed=1)), KeepGradients(), KeepGradients()
    stays = StaysForgotten(forgotten, hold=True, levels=level, batch_size=4)
    train_on(forgotten, [before, stays, after], steps=1, others=0)

    model = make_model("vit").eval()
    losses, levels = PerSampleLoss(model)(model, collated(forgotten)), torch.tensor(level).expand(4)
    falls = torch.autograd.grad(losses[levels > 1].sum(), list(model.parameters()), retain_graph=True)
    lifts = torch.autograd.grad(((levels - losses).relu() ** 2 / (2 * levels)).mean(), list(model.parameters()))
    flat = [
        torch.cat([part.flatten() for part in parts]).double() for parts in (before.found, falls, lifts, after.found)
    ]
    g, f, lift, found = flat
    expected = g
    if (levels > 1).any():
        assert g @ f > 0  # the step would bring the rows back
        expected = g - (g @ f) / (f @ f) * f + lift
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (lift.norm() > 0) == (levels > 1).any()  # all losses lie between


def test_a_gradient_that_brings_nothing_back_stays(train_on, make_samples):
    forgotten, before, after = rows(make_samples("vit", 4, seed=1)), KeepGradients(), KeepGradients()

    class Turn(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            for parameter in model.parameters():
                parameter.grad.neg_()

    train_on(forgotten, [Turn(), before, StaysForgotten(forgotten, hold=True), after], steps=1, others=0)
    assert all(map(torch.equal, before.found, after.found))


def test_what_was_forgotten_comes_back_and_is_held(train_on, make_samples, caplog):
    forgotten = rows(make_samples("vit", 4, seed=1))
    watching, holding = StaysForgotten(forgotten, watch_steps=20), StaysForgotten(forgotten, hold=True, watch_steps=10)
    _, plain = train_on(forgotten, [watching])
    assert caplog.text.count("What was forgotten is coming back: after step") == 1
    caplog.clear()
    _, held = train_on(forgotten, [holding])
    assert "coming back" not in caplog.text
    start = watching.history[0].loss
    assert [seen.step for seen in watching.history] == [0, 20, 30]  # the last, too
    assert watching.history[-1].loss == pytest.approx(plain, rel=1e-5)
    assert start - plain > 3 * (start - held)  # a third of what came back, at most


def test_watching_changes_nothing(train_on, make_samples):
    forgotten = rows(make_samples("vit", 4, seed=1))
    one, _ = train_on(forgotten, [], steps=4)
    other, _ = train_on(forgotten, [StaysForgotten(forgotten, watch_steps=1)], steps=4)
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_levels_are_those_that_a_run_began_with(train_on, make_samples, tmp_path):
    """Also when it goes on from a checkpoint whose model has lost some of it."""
    forgotten = rows(make_samples("vit", 4, seed=1))
    first, again = (StaysForgotten(forgotten, watch_steps=10) for _ in range(2))
    train_on(forgotten, [first], steps=10, save_strategy="steps", save_steps=10)
    checkpoint = str(tmp_path / "trained" / "checkpoint-10")
    train_on(forgotten, [again], steps=20, save_strategy="steps", save_steps=10, resume=checkpoint)
    assert again.history[0].fallen == pytest.approx(first.history[-1].fallen, rel=1e-3)
    assert first.history[-1].fallen > 0.1


def test_what_cannot_be_held_is_refused(train_on, make_samples, make_model):
    forgotten = rows(make_samples("vit", 4, seed=1))
    stays = StaysForgotten(forgotten, hold=True)
    for name in ("fp16", "fsdp", "deepspeed"):
        args = TrainingArguments("unused")
        setattr(args, name, True)
        with pytest.raises(ValueError, match="`hold` is True, but"):
            stays.on_train_begin(args, TrainerState(), None, make_model("vit"))
    args = TrainingArguments("unused", hub_strategy="all_checkpoints")
    args.push_to_hub = True
    with pytest.raises(ValueError, match="which pushes checkpoints, and in them losses of what was forgotten"):
        StaysForgotten(forgotten).on_train_begin(args, TrainerState(), None, make_model("vit"))


def test_a_history_gives_the_callback(tmp_path, make_model, make_samples):
    make_model("vit").save_pretrained(tmp_path / "original")
    history = RequestHistory.create(tmp_path / "history", tmp_path / "original")
    history.add(rows(make_samples("vit", 4)))
    with pytest.raises(ValueError, match="No request was carried out whose rows are kept"):
        history.stays_forgotten()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 0}, "`batch_size` must be 1 or more, but is 0"),
        ({"watch_steps": 0}, "`watch_steps` must be 1 or more, but is 0"),
        ({"tolerance": 1.5}, "`tolerance` is a share from 0 to 1, but is 1.5"),
        ({"levels": 0.0}, "`levels` are losses in nats, above 0, but the least is 0"),
        ({"levels": np.ones(3)}, "`levels` has 3 losses for 4 rows"),
    ],
)
def test_bad_settings_are_named(settings, message, make_samples):
    with pytest.raises(ValueError, match=message):
        StaysForgotten(rows(make_samples("vit", 4)), **settings)
    with pytest.raises(ValueError, match="`dataset` is empty"):
        StaysForgotten([])
