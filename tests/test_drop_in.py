"""What users of Trainer do with it works here too: with a forget set, and, without one, step for step as in Trainer."""

import copy
import logging
from dataclasses import dataclass, field, fields, replace

import pytest
import torch
from conftest import MODELS, Samples
from datasets import IterableDataset
from launched import samples
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.callbacks import ReferenceLosses, find_callback
from hf_orthograd.data import fill_last_batch


@dataclass
class ProjectArguments(TrainingArguments):
    """As users make them: fields of their own, and a check of their own."""

    project: str = field(default="none", metadata={"help": "Whose."})
    tags: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__post_init__()
        if not self.project:
            raise ValueError("`project` must have a name.")


def settings(tmp_path, args_class=OrthoGradConfig, **changes):
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_forget_batch_size": 4,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
    }
    defaults |= changes
    known = {f.name for f in fields(args_class)}
    return args_class(str(tmp_path), **{name: value for name, value in defaults.items() if name in known})


def unlearner(tmp_path, kind="vit", trainer_class=OrthoGradTrainer, args=None, **given):
    sets = {"train_dataset": samples(kind, 8, seed=1), "forget_dataset": samples(kind, 8, seed=2)}
    torch.manual_seed(0)
    model = {} if "model_init" in given else {"model": MODELS[kind]()}
    return trainer_class(args=args or settings(tmp_path), **(model | sets | given))


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


# ---- Arguments ----


@pytest.mark.parametrize("args_class", [TrainingArguments, ProjectArguments, OrthoGradConfig])
def test_without_a_forget_set_the_arguments_are_the_very_object(args_class, tmp_path):
    args = settings(tmp_path, args_class)
    trainer = OrthoGradTrainer(MODELS["vit"](), args, train_dataset=samples("vit", 8, seed=1))
    assert trainer.args is args
    trainer.train()
    assert trainer.args is args


def test_with_a_forget_set_the_users_arguments_are_all_there(tmp_path):
    args = settings(tmp_path, ProjectArguments, project="voices", tags=["a"], learning_rate=3e-4, seed=7)
    before = copy.deepcopy(args.to_dict())
    trainer = unlearner(tmp_path, args=args)
    assert isinstance(trainer.args, ProjectArguments) and isinstance(trainer.args, OrthoGradConfig)
    assert (trainer.args.project, trainer.args.tags, trainer.args.learning_rate) == ("voices", ["a"], 3e-4)
    assert trainer.args.alpha == OrthoGradConfig.alpha and trainer.args.forget_loss == "npo"
    for f in fields(args):
        assert getattr(trainer.args, f.name) == getattr(args, f.name), f.name
    assert args.to_dict() == before and not hasattr(args, "alpha")
    trainer.train()
    # what Trainer saves beside a model is such arguments, and they are read again
    trainer.save_model()
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert isinstance(loaded, ProjectArguments) and loaded.project == "voices" and loaded.alpha == 0.5
    assert replace(loaded, project="others").project == "others"


def test_a_subclass_of_the_configuration_is_kept(tmp_path):
    @dataclass
    class Mine(OrthoGradConfig):
        more: int = 3

    args = settings(tmp_path, Mine, alpha=0.2, more=4)
    trainer = unlearner(tmp_path, args=args)
    assert trainer.args is args and (trainer.args.more, trainer.args.alpha) == (4, 0.2)


def test_a_budget_leaves_the_users_arguments_alone(tmp_path):
    """What a budget needs is set on the trainer's own copy: the same arguments without it are as they were."""
    args = settings(
        tmp_path, retain_budget=1.0, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=5
    )
    trainer = unlearner(tmp_path, args=args, eval_dataset={"retain": samples("vit", 4, seed=3)})
    assert trainer.args.save_strategy == "best" and trainer.args.load_best_model_at_end
    assert args.save_strategy == "steps" and not args.load_best_model_at_end and args.metric_for_best_model is None
    assert replace(args, retain_budget=None).save_strategy == "steps"


# ---- Optimizers, models, data ----


def test_custom_optimizer_and_scheduler(tmp_path):
    model = MODELS["vit"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    before = flat(model)
    trainer = unlearner(tmp_path, model=model, optimizers=(optimizer, scheduler))
    trainer.train()
    assert (
        trainer.optimizer.optimizer is optimizer and trainer.get_last_lr() if hasattr(trainer, "get_last_lr") else True
    )
    assert trainer.state.log_history[0]["learning_rate"] == 0.05
    assert not torch.equal(flat(model), before)


def test_optimizer_class_and_arguments(tmp_path):
    given = {"optimizer_cls_and_kwargs": (torch.optim.Adagrad, {"lr": 0.01})}
    trainer = unlearner(tmp_path, **given)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.Adagrad)


@pytest.mark.parametrize("optim", ["adafactor", "adagrad", "rmsprop"])
def test_other_optimizers(optim, tmp_path):
    trainer = unlearner(tmp_path, args=settings(tmp_path, optim=optim))
    before = flat(trainer.model)
    trainer.train()
    assert torch.isfinite(flat(trainer.model)).all() and not torch.equal(flat(trainer.model), before)


def test_model_init_starts_each_run_anew(tmp_path):
    def model_init():
        torch.manual_seed(3)
        return MODELS["vit"]()

    trainer = unlearner(tmp_path, model_init=model_init)
    ends = []
    for _ in range(2):
        trainer.train()
        ends.append(flat(trainer.model))
    assert torch.equal(*ends)


def test_runs_of_a_search_know_nothing_of_one_another(tmp_path):
    """As in `hyperparameter_search`: values are written into the arguments, and each run starts the model anew."""

    def model_init(trial=None):
        torch.manual_seed(3)
        return MODELS["vit"]()

    trainer = unlearner(tmp_path, model_init=model_init, args=settings(tmp_path, max_steps=3))
    ends, references = [], []
    for rate in (1e-4, 1e-2, 1e-4):
        trainer.args.learning_rate = rate
        trainer.train()
        ends.append(flat(trainer.model))
        references.append(find_callback(trainer.callback_handler, ReferenceLosses).losses)
    assert torch.equal(ends[0], ends[2]) and not torch.equal(ends[0], ends[1])
    assert references[0] == references[1] == references[2]


def test_a_second_training_goes_on_from_where_the_first_ended(tmp_path):
    """NPO compares with the model that this run starts from, not with that of the run before."""
    trainer = unlearner(tmp_path, args=settings(tmp_path, max_steps=3, learning_rate=1e-2))
    trainer.train()
    first = find_callback(trainer.callback_handler, ReferenceLosses).losses
    middle = copy.deepcopy(trainer.model)
    trainer.train()
    again = unlearner(tmp_path, model=middle, args=settings(tmp_path, max_steps=3, learning_rate=1e-2))
    again.train()
    found = [find_callback(one.callback_handler, ReferenceLosses).losses for one in (trainer, again)]
    assert found[0] == pytest.approx(found[1], abs=1e-6) and found[0] != pytest.approx(first, abs=1e-3)


def stream(kind="vit", count=16, seed=1):
    rows = samples(kind, count, seed).examples
    return IterableDataset.from_generator(lambda: iter([{k: v.numpy() for k, v in row.items()} for row in rows]))


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(samples("vit", 16, seed=1).examples)


@pytest.mark.parametrize("make", [stream, Streamed])
def test_streaming_retain_sets(make, tmp_path):
    trainer = unlearner(tmp_path, train_dataset=make())
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.state.log_history[0]["retain_loss"] > 0


def test_a_run_on_a_stream_is_resumed(tmp_path):
    def run(folder, resume=None):
        args = settings(folder, max_steps=4, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2,
                        per_device_train_batch_size=2)  # fmt: skip
        trainer = unlearner(folder, train_dataset=Streamed(), args=args)
        trainer.train(resume_from_checkpoint=resume)
        return flat(trainer.model)

    whole = run(tmp_path / "whole")
    assert torch.equal(run(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-2")), whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_data_loader_workers_change_nothing(workers, tmp_path):
    ends = []
    for number in (0, workers):
        args = settings(
            tmp_path, max_steps=3, dataloader_num_workers=number, dataloader_prefetch_factor=2 if number else None
        )
        trainer = unlearner(tmp_path, args=args)
        trainer.train()
        ends.append(flat(trainer.model))
    assert torch.equal(*ends)


# ---- Evaluation and resuming ----


@pytest.mark.parametrize("budget", [None, 10.0])
def test_eval_on_start(budget, tmp_path):
    """With a budget there is a model to go back to all the same."""
    args = settings(tmp_path, eval_on_start=True, eval_strategy="steps", eval_steps=1, retain_budget=budget)
    sets = {"retain": samples("vit", 4, seed=3), "forget": samples("vit", 8, seed=2)}
    trainer = unlearner(tmp_path, args=args, eval_dataset=sets)
    trainer.train()
    assert trainer.state.log_history[0]["step"] == 0 and "eval_forget_loss" in trainer.state.log_history[1]
    assert (tmp_path / "checkpoint-0" / "model.safetensors").exists() == (budget is not None)


def test_load_best_model_at_end_by_a_metric_of_the_user(tmp_path):
    args = settings(
        tmp_path, max_steps=4, learning_rate=0.05, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer = unlearner(tmp_path, args=args, eval_dataset=samples("vit", 6, seed=4))
    trainer.train()
    evaluations = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(evaluations, key=evaluations.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[best], abs=1e-6)


def test_early_stopping_of_transformers(tmp_path):
    args = settings(
        tmp_path, max_steps=30, learning_rate=0.3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", save_total_limit=2,
    )  # fmt: skip
    trainer = unlearner(
        tmp_path, args=args, eval_dataset=samples("vit", 6, seed=4), callbacks=[EarlyStoppingCallback(2)]
    )
    trainer.train()
    assert trainer.state.global_step < 30


def test_resuming_with_another_batch_size_goes_on(tmp_path):
    first = unlearner(tmp_path, args=settings(tmp_path, max_steps=4, save_strategy="steps", save_steps=2))
    first.train()
    args = settings(tmp_path, max_steps=6, per_device_train_batch_size=2, per_device_forget_batch_size=3)
    resumed = unlearner(tmp_path, args=args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 6
    assert all(e["forget_loss"] > 0 for e in resumed.state.log_history if "forget_loss" in e)


class OutOfMemory(OrthoGradTrainer):
    """Has memory for forget batches of two rows."""

    def unlearning_loss(self, model, forget, retain):
        if forget[0].size > 2:
            raise RuntimeError("CUDA out of memory.")
        return super().unlearning_loss(model, forget, retain)


def test_auto_find_batch_size_makes_both_batches_smaller(tmp_path, caplog):
    args = settings(tmp_path, per_device_train_batch_size=8, per_device_forget_batch_size=8, auto_find_batch_size=True)
    trainer = unlearner(tmp_path, trainer_class=OutOfMemory, args=args)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 2
    assert "Forget batches shrink as the retain batches do, from 8 to 2 rows" in caplog.text
    assert "protects the gradients of only 2 retain samples" in caplog.text


# ---- Each step protects as many samples ----


class Sizes(OrthoGradTrainer):
    def unlearning_loss(self, model, forget, retain):
        self.sizes = [*getattr(self, "sizes", []), sum(batch.size for batch in retain)]
        self.rows = [*getattr(self, "rows", []), *(row for batch in retain for row in batch.rows.tolist())]
        return super().unlearning_loss(model, forget, retain)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_last_batch_of_an_epoch_is_filled_up(accumulation, tmp_path):
    """17 rows in steps of 8: none protects a single sample, and each row comes in each epoch."""
    args = settings(
        tmp_path, max_steps=-1, num_train_epochs=1, per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    trainer = unlearner(tmp_path, trainer_class=Sizes, args=args, train_dataset=samples("vit", 17, seed=1))
    trainer.train()
    assert trainer.sizes == [8, 8, 8] and set(trainer.rows) == set(range(17))


def test_a_retain_set_smaller_than_a_step_is_taken_whole(tmp_path, caplog):
    args = settings(tmp_path, per_device_train_batch_size=16)
    trainer = unlearner(tmp_path, trainer_class=Sizes, args=args, train_dataset=samples("vit", 5, seed=1))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.sizes == [5, 5] and "was to protect 16 retain samples, but `train_dataset` has 5" in caplog.text


def test_other_samplers_keep_their_order():
    sampler = SequentialSampler(range(17))
    assert fill_last_batch(sampler, 17, 8) is sampler


# ---- Steps that have no part in it ----


def test_training_step_alone_says_what_is_missing(tmp_path):
    trainer = unlearner(tmp_path)
    with pytest.raises(RuntimeError, match="call `train\\(\\)`"):
        trainer.training_step(trainer.model, {})


class Steps(TrainerCallback):
    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(
            {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        )


class WithUnused(torch.nn.Module):
    """One parameter that no loss uses: AdamW would decay it if it got a gradient of zero."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = torch.nn.Linear(3, 2), torch.nn.Parameter(torch.ones(4))

    def forward(self, x, labels=None):
        return {"logits": self.used(x)}


def loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")


@pytest.mark.parametrize("engine", ["gram", "loop"])
@pytest.mark.parametrize("projection", ["orthogonal", "mean", "none"])
def test_a_parameter_that_no_loss_uses_gets_no_gradient(engine, projection, tmp_path):
    def rows(seed):
        generator = torch.Generator().manual_seed(seed)
        return Samples([{"x": torch.randn(3, generator=generator), "labels": torch.tensor(n % 2)} for n in range(8)])

    steps = Steps()
    args = settings(tmp_path, gradient_engine=engine, projection=projection, weight_decay=0.5, learning_rate=0.1)
    sets = {"train_dataset": rows(1), "forget_dataset": rows(2), "compute_loss_func": loss}
    trainer = OrthoGradTrainer(WithUnused(), args, **sets, callbacks=[steps])
    trainer.train()
    assert all(one["unused"] is None and one["used.weight"] is not None for one in steps.gradients)
    assert torch.equal(trainer.model.unused.detach(), torch.ones(4))


def test_without_a_forget_set_predictions_are_those_of_trainer(tmp_path):
    rows, found = samples("vit", 6, seed=1), []
    for trainer_class in (Trainer, OrthoGradTrainer):
        torch.manual_seed(0)
        trainer = trainer_class(MODELS["vit"](), settings(tmp_path, TrainingArguments), eval_dataset=rows)
        found.append((trainer.evaluate()["eval_loss"], trainer.predict(rows).predictions))
    assert found[0][0] == found[1][0] and (found[0][1] == found[1][1]).all()


def test_the_log_follows_the_log_level(tmp_path):
    """The library's own, which is none of transformers'."""
    logger = logging.getLogger("hf_orthograd")
    for level, shown in (("info", True), ("warning", False)):
        unlearner(tmp_path, args=settings(tmp_path, log_level=level))
        assert logging.getLogger("hf_orthograd.gradients.selection").isEnabledFor(logging.INFO) == shown
        assert logger.hasHandlers()
