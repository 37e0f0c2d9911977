"""Training that ends in time, at the best model inside the budget, and never at one that is not a number."""

import math

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.baselines import ScrubTrainer
from hf_orthograd.callbacks import StoppingRule, find_callback
from hf_orthograd.evaluation import UnlearningReport, evaluate_unlearning
from hf_orthograd.evaluation.settings import run_settings


def make_trainer(tmp_path, model, make_samples, eval_dataset="retain", callbacks=(), compute_metrics=None, **settings):
    retain, forget = make_samples("vit", 8, seed=1), make_samples("vit", 6, seed=2)
    if eval_dataset == "retain":
        eval_dataset = make_samples("vit", 8, seed=3)
    defaults = {
        "max_steps": 12,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "per_device_forget_batch_size": 4,
        "alpha": 0.1,
        "report_to": "none",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    args = OrthoGradConfig(str(tmp_path), **(defaults | settings))
    return OrthoGradTrainer(
        model, args, train_dataset=retain, forget_dataset=forget, eval_dataset=eval_dataset,
        callbacks=list(callbacks), compute_metrics=compute_metrics,
    )  # fmt: skip


def loss_of(model, samples):
    model.eval()
    with torch.no_grad():
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        return model(**batch).loss.item()


class Snapshots(TrainerCallback):
    def __init__(self, model):
        self.model, self.taken = model, {}

    def take(self, step):
        self.taken[step] = [p.detach().clone() for p in self.model.parameters()]

    def on_train_begin(self, args, state, control, **kwargs):
        self.take(0)

    def on_step_end(self, args, state, control, **kwargs):
        self.take(state.global_step)


def same(model, parameters):
    return all(torch.equal(p, other) for p, other in zip(model.parameters(), parameters, strict=True))


def test_stops_where_the_forget_target_is_reached(tmp_path, make_model, make_samples, caplog):
    model, forget = make_model("vit"), make_samples("vit", 6, seed=2)
    target = loss_of(model, forget) + 0.3
    trainer = make_trainer(tmp_path, model, make_samples, forget_target=target, max_steps=200)
    trainer.train()
    assert 2 <= trainer.state.global_step < 200 and trainer.state.global_step % 2 == 0
    assert loss_of(model, forget) >= target and "no evaluation found" not in caplog.text
    assert run_settings(trainer)["ended"] == "the forget target was reached"
    evaluated = [entry["eval_forget_loss"] for entry in trainer.state.log_history if "eval_forget_loss" in entry]
    assert evaluated[-1] >= target > max(evaluated[:-1])
    # the first of them is that of the model before any step
    assert evaluated[0] == pytest.approx(target - 0.3, abs=1e-4)


@pytest.mark.parametrize(
    ("eval_delay", "found"), [(0, "at the last one `loss` on the forget set was"), (9, "no evaluation came")]
)
def test_a_target_that_was_not_reached_is_told(eval_delay, found, tmp_path, make_model, make_samples, caplog):
    trainer = make_trainer(
        tmp_path, make_model("vit"), make_samples, forget_target=50.0, max_steps=3, eval_delay=eval_delay
    )
    trainer.train()
    assert f"ended after step 3, and no evaluation found `forget_target` reached: {found}" in caplog.text
    assert "the target is 50. Raise `max_steps`" in caplog.text
    assert run_settings(trainer)["ended"] == "all steps were made before the forget target was reached"


@pytest.mark.parametrize(("forgotten", "told"), [(2.5, False), (1.5, True), (None, True)])
def test_a_target_that_the_last_evaluation_reached_is_not_told_of(forgotten, told, tmp_path, caplog):
    """Also where that was outside of the budget, and where a checkpoint was saved after it."""
    args = OrthoGradConfig(str(tmp_path), forget_target=2.0, retain_budget=0.1, stop_patience=3, eval_strategy="epoch")
    rule, state, control = StoppingRule(args), TrainerState(global_step=4), TrainerControl()
    rule.take_baseline({"eval_forget_loss": 1.0, "eval_retain_loss": 1.0})
    if forgotten is not None:
        rule.take_evaluation({"eval_forget_loss": forgotten, "eval_retain_loss": 9.0}, dict, state, control)
    resumed = StoppingRule()
    state.stateful_callbacks = {"StoppingRule": rule.state()}
    resumed.begin_run(args, state, evaluate=None, save=None)
    for one in (rule, resumed):
        caplog.clear()
        one.on_train_end(args, state, control)
        assert ("no evaluation found" in caplog.text) is told
        assert ("Raise `num_train_epochs`" in caplog.text) is told


def test_reference_is_the_level_of_unseen_data_before_the_first_step(tmp_path, make_model, make_samples):
    model, forget = make_model("vit"), make_samples("vit", 6, seed=2)
    # the forget set has been learnt, and the reference has not
    learner = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(30):
        batch = {key: torch.stack([sample[key] for sample in forget]) for key in forget[0]}
        learner.zero_grad()
        model(**batch).loss.backward()
        learner.step()
    unseen = make_samples("vit", 6, seed=5)
    level = loss_of(model, unseen)
    assert loss_of(model, forget) < level - 0.2
    sets = {"reference": unseen, "forget": forget}
    trainer = make_trainer(tmp_path, model, make_samples, sets, forget_target="reference", max_steps=300)
    trainer.train()
    assert trainer.state.global_step < 300
    evaluated = [entry["eval_forget_loss"] for entry in trainer.state.log_history if "eval_forget_loss" in entry]
    assert evaluated[-1] >= level > max(evaluated[:-1])


@pytest.mark.parametrize("patience", [0, 2])
def test_breached_budget_stops_and_the_best_model_inside_returns(patience, tmp_path, make_model, make_samples):
    model = make_model("vit")
    snapshots, kept = Snapshots(model), make_samples("vit", 8, seed=3)
    budget = 0.02
    settings = {"retain_budget": budget, "stop_patience": patience, "max_steps": 200}
    trainer = make_trainer(tmp_path, model, make_samples, callbacks=[snapshots], **settings)
    start = loss_of(model, kept)
    trainer.train()
    history = [
        (entry["step"], entry["eval_loss"] - start) for entry in trainer.state.log_history if "eval_loss" in entry
    ]
    forgotten = {e["step"]: e["eval_forget_loss"] for e in trainer.state.log_history if "eval_forget_loss" in e}
    breaches = [step for step, rise in history if rise > budget]
    assert trainer.state.global_step == breaches[-1] == history[-1][0] < 200
    assert len(breaches) > patience
    inside = [step for step, rise in history if rise <= budget]
    best = max(inside, key=lambda step: forgotten[step])
    assert same(model, snapshots.taken[best])
    assert loss_of(model, kept) - start <= budget
    assert run_settings(trainer)["ended"] == "the retain budget was exceeded"


@pytest.mark.parametrize("scaled", [False, True])
def test_run_that_diverges_ends_with_the_last_good_model(scaled, tmp_path, make_model, make_samples, caplog):
    model = make_model("vit")
    snapshots = Snapshots(model)
    settings = {"learning_rate": 1e30, "retain_budget": 0.5, "eval_steps": 10, "max_grad_norm": 0.0}
    trainer = make_trainer(tmp_path, model, make_samples, callbacks=[snapshots], fp16=scaled, **settings)
    if scaled:
        trainer.accelerator.native_amp, trainer.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=1.0)
    trainer.train()
    assert trainer.state.global_step < 10
    # the step that broke it was made, and taken back
    assert not same(model, snapshots.taken[1]) and max(p.abs().max() for p in snapshots.taken[1]) > 1e20
    assert same(model, snapshots.taken[0])
    assert "is not finite" in caplog.text and "checkpoint-0" in caplog.text
    assert run_settings(trainer)["ended"] == "a loss or gradient was not finite"


def test_a_report_says_how_the_model_was_made(tmp_path, make_model, make_samples):
    trainer = make_trainer(tmp_path, make_model("vit"), make_samples, max_steps=2, eval_strategy="no", optim="sgd")
    sets = {"forget": make_samples("vit", 6, seed=2)}
    assert evaluate_unlearning(trainer, datasets=sets).settings == {}  # nothing was trained
    trainer.train()
    report = evaluate_unlearning(trainer, datasets=sets)
    expected = {
        "trainer": "OrthoGradTrainer", "projection": "orthogonal", "forget_loss": "npo", "retain_loss": "nll",
        "alpha": 0.1, "forget_samples_per_step": 4, "retain_samples_per_step": 4, "samples_at_hand": 8,
        "learning_rate": 0.05, "optim": "sgd", "ended": "all steps were made",
    }  # fmt: skip
    assert expected.items() <= report.settings.items()
    assert "| retain samples per step | 4 |" in report.to_markdown()
    assert UnlearningReport.from_json(report.to_json()).settings == report.settings

    class Own(OrthoGradTrainer):
        pass

    forget = make_samples("vit", 3, seed=2)
    trainer.args.alpha, trainer.args.projection = 0.0, "none"
    own = Own(make_model("vit"), trainer.args, forget_dataset=forget)
    own.train()
    found = run_settings(own)
    assert found["trainer"] == "OrthoGradTrainer"  # a name of one's own may tell whose data it was
    sizes = ("forget_samples_per_step", "retain_samples_per_step", "samples_at_hand")
    assert [found[name] for name in sizes] == [3, 0, 0]
    few = OrthoGradTrainer(
        make_model("vit"), trainer.args, train_dataset=make_samples("vit", 2), forget_dataset=forget
    )
    few.train()
    assert [run_settings(few)[name] for name in sizes] == [3, 2, 2]  # a step has no more than there are
    taught = ScrubTrainer(make_model("vit"), trainer.args, train_dataset=make_samples("vit", 8), forget_dataset=forget)
    taught.train()
    assert run_settings(taught)["trainer"] == "ScrubTrainer" and "forget_loss" not in run_settings(taught)
    plain = Trainer(make_model("vit"), TrainingArguments(str(tmp_path), report_to="none", max_steps=1, disable_tqdm=True),
                    train_dataset=make_samples("vit", 8, seed=1))  # fmt: skip
    plain.train()
    assert run_settings(plain)["samples_per_step"] == 8 and "alpha" not in run_settings(plain)

    class OwnRule(torch.optim.RMSprop):
        pass

    model = make_model("vit")
    optimizers = OwnRule(model.parameters(), lr=3e-4), None
    handed = Trainer(model, plain.args, train_dataset=plain.train_dataset, optimizers=optimizers)
    handed.train()
    assert run_settings(handed)["optim"] == "RMSprop" and run_settings(handed)["learning_rate"] == 3e-4


def test_evaluation_that_is_not_a_number_is_outside_of_any_budget(tmp_path, make_model, make_samples):
    model = make_model("vit")
    snapshots = Snapshots(model)
    settings = {"learning_rate": 1e30, "retain_budget": 1e9, "eval_steps": 1, "stop_patience": 5}
    trainer = make_trainer(tmp_path, model, make_samples, callbacks=[snapshots], **settings)
    trainer.train()
    assert trainer.state.global_step == 1 and same(model, snapshots.taken[0])


def test_metrics_whose_greater_values_are_better(tmp_path, make_model, make_samples):
    def accuracy(prediction):
        return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}

    settings = {"stop_metric": "accuracy", "stop_greater_is_better": True, "forget_target": 0.0, "max_steps": 200}
    trainer = make_trainer(tmp_path, make_model("vit"), make_samples, compute_metrics=accuracy, **settings)
    trainer.train()
    assert trainer.state.global_step < 200
    evaluated = [e["eval_forget_accuracy"] for e in trainer.state.log_history if "eval_forget_accuracy" in e]
    assert evaluated[-1] == 0.0


def test_resumed_rule_goes_on_from_its_baseline(tmp_path, make_model, make_samples):
    settings = {"retain_budget": 10.0, "max_steps": 4}
    first = make_trainer(tmp_path, make_model("vit"), make_samples, **settings)
    first.train()
    baseline = find_callback(first.callback_handler, StoppingRule).baseline
    assert set(baseline) == {"forget", "retain"} and all(map(math.isfinite, baseline.values()))
    resumed = make_trainer(tmp_path, make_model("vit"), make_samples, **(settings | {"max_steps": 8}))
    resumed.train(resume_from_checkpoint=True)
    assert find_callback(resumed.callback_handler, StoppingRule).baseline == baseline
    assert resumed.state.log_history[0]["step"] == 0  # the evaluation before the first step, once
    assert sum(entry["step"] == 0 and "eval_forget_loss" in entry for entry in resumed.state.log_history) == 1


def test_rule_that_a_checkpoint_does_not_know_is_refused(tmp_path, make_model, make_samples):
    make_trainer(tmp_path, make_model("vit"), make_samples, max_steps=4, save_steps=2).train()
    later = make_trainer(tmp_path, make_model("vit"), make_samples, max_steps=8, forget_target=9.0)
    with pytest.raises(ValueError, match="from before the first step"):
        later.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("settings", "sets", "message"),
    [
        ({"forget_target": 3.0, "eval_strategy": "no"}, "retain", "`forget_target`.*`eval_strategy` is 'no'"),
        ({"retain_budget": 1.0}, None, "`retain_budget` is 1.0, but `eval_dataset` is missing"),
        ({"retain_budget": 1.0}, {"test": 1}, r"has no 'retain' among \['test'\]"),
        ({"forget_target": "reference"}, {"retain": 1}, "'reference' among"),
        ({"forget_target": 0.9, "stop_metric": "wer"}, "retain", "`stop_metric` is 'wer'.*`compute_metrics`"),
    ],
)
def test_rule_that_could_not_be_judged_is_refused(settings, sets, message, tmp_path, make_model, make_samples):
    if isinstance(sets, dict):
        sets = {name: make_samples("vit", 4, seed=3) for name in sets}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make_model("vit"), make_samples, sets, **settings)


def test_rule_without_a_forget_set_is_refused(tmp_path, make_model, make_samples):
    args = OrthoGradConfig(str(tmp_path), report_to="none", eval_strategy="steps", retain_budget=0.1)
    with pytest.raises(ValueError, match="`retain_budget` is for unlearning, but there is no `forget_dataset`"):
        OrthoGradTrainer(make_model("vit"), args, train_dataset=make_samples("vit", 4))


def test_metric_that_is_missing_is_found_before_the_first_step(tmp_path, make_model, make_samples):
    model = make_model("vit")
    before = [p.detach().clone() for p in model.parameters()]
    settings = {"stop_metric": "wer", "forget_target": 0.9}
    trainer = make_trainer(tmp_path, model, make_samples, compute_metrics=lambda _: {"accuracy": 1.0}, **settings)
    with pytest.raises(ValueError, match="gave no 'eval_forget_wer'.*eval_forget_accuracy"):
        trainer.train()
    assert same(model, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forget_target": "much"}, "`forget_target` must be a number or 'reference', but is 'much'"),
        ({"retain_budget": -0.1}, "`retain_budget` must be a finite number of 0 or more, but is -0.1"),
        ({"monitor_steps": -1}, "`monitor_steps` must be a whole number of 0 or more, but is -1"),
        ({"retain_budget": 0.1, "metric_for_best_model": "loss"}, "`metric_for_best_model` is 'loss'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        OrthoGradConfig(str(tmp_path), report_to="none", eval_strategy="steps", **settings)


def test_a_handler_without_a_rule_has_none():
    assert find_callback(CallbackHandler([], None, None, None, None), StoppingRule) is None
