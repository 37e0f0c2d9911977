import copy
import json

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.checkpoints import is_whole
from hf_orthograd.evaluation import evaluate_unlearning


ALL = ["whisper", "wav2vec2", "vit", "llama"]
K, M = 4, 3


def config(tmp_path, **settings):
    defaults = {
        "per_device_train_batch_size": K,
        "per_device_forget_batch_size": M,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "alpha": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return OrthoGradConfig(str(tmp_path), **{**defaults, **settings})


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).clone()


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("engine", ["gram", "loop"])
def test_one_step_is_orthogonal_to_every_retain_gradient(
    kind, engine, tmp_path, make_model, make_samples, loop_gradients
):
    model, retain, forget = make_model(kind), make_samples(kind, K, seed=1), make_samples(kind, M, seed=2)
    retain_gradients, forget_gradients = loop_gradients(model, retain), loop_gradients(model, forget)
    before = flat(model)
    trainer = OrthoGradTrainer(
        model, config(tmp_path, gradient_engine=engine), train_dataset=retain, forget_dataset=forget
    )
    trainer.train()
    change = (flat(model) - before).double()

    cosines = torch.nn.functional.cosine_similarity(change[None], retain_gradients.double())
    assert change.norm() > 0
    assert cosines.abs().max() <= 1e-4
    # the unprojected step would not have passed
    forget_gradient = forget_gradients.double().mean(dim=0)
    assert torch.nn.functional.cosine_similarity(forget_gradient[None], retain_gradients.double()).abs().max() > 1e-2

    basis, _ = torch.linalg.qr(retain_gradients.double().T)
    projected = forget_gradient - basis @ (basis.T @ forget_gradient)
    logged = trainer.state.log_history[0]
    assert logged["kept_signal"] == pytest.approx((projected.norm() / forget_gradient.norm()).item(), abs=1e-5)
    assert logged["projection_rank"] == K
    assert logged["projection_residual"] < 1e-4
    # ascent: the step goes along the projected forget gradient
    torch.testing.assert_close(change.float(), 0.1 * projected.float(), rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("kind", ALL)
def test_bf16_autocast_follows_the_model(kind, tmp_path, make_model, make_samples, loop_gradients):
    """Compute in bfloat16, parameters and inner products in float32: orthogonal to what bfloat16 can tell."""
    model, retain, forget = make_model(kind), make_samples(kind, K, seed=1), make_samples(kind, M, seed=2)
    rows, before = loop_gradients(model, retain).double(), flat(model)
    args = config(tmp_path, bf16=True, use_cpu=True)
    trainer = OrthoGradTrainer(model, args, train_dataset=retain, forget_dataset=forget)
    trainer.train()
    assert trainer.gradient_engine.name == "gram"
    change = (flat(model) - before).double()
    assert torch.nn.functional.cosine_similarity(change[None], rows).abs().max() <= 3e-2
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("args_class", [TrainingArguments, OrthoGradConfig])
@pytest.mark.parametrize("kind", ["whisper", "llama"])
def test_without_forget_set_it_is_trainer(args_class, kind, tmp_path, make_model, make_samples):
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "logging_steps": 1,
    }
    results = []
    for trainer_class, args in (
        (Trainer, TrainingArguments(str(tmp_path), **settings)),
        (OrthoGradTrainer, args_class(str(tmp_path), **settings)),
    ):
        model = make_model(kind, dropout=0.1)
        trainer = trainer_class(model, args, train_dataset=make_samples(kind, 9))
        trainer.train()
        losses = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
        results.append((flat(model), losses))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


class TwoParameters(torch.nn.Module):
    """Loss of a sample x is the dot product of its features with the parameters."""

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor([1.0, 1.0]))

    def forward(self, features, labels=None):
        return {"dots": features @ self.theta}


def dot_loss(outputs, labels, num_items_in_batch=None):
    return outputs["dots"]


def toy_trainer(tmp_path, **settings):
    from conftest import Samples

    retain = Samples([{"features": torch.tensor([2.0, 0.0]), "labels": torch.tensor(0)}])
    forget = Samples([{"features": torch.tensor([3.0, 4.0]), "labels": torch.tensor(0)}])
    model = TwoParameters()
    args = config(tmp_path, per_device_train_batch_size=1, per_device_forget_batch_size=1, **settings)
    return model, OrthoGradTrainer(
        model, args, train_dataset=retain, forget_dataset=forget, compute_loss_func=dot_loss
    )


# g = (2, 0), g_u = (3, 4): g_perp = (0, 4); learning rate 0.1
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"alpha": 0.0}, (1.0, 1.4)),
        ({"alpha": 0.25}, (1.0 - 0.1 * 0.25 * 2, 1.0 + 0.1 * 0.75 * 4)),
        ({"alpha": 1.0}, (0.8, 1.0)),
        ({"alpha": 0.0, "projection": "none"}, (1.3, 1.4)),
        ({"alpha": 0.25, "projection": "none"}, (1.0 + 0.1 * (0.75 * 3 - 0.25 * 2), 1.3)),
        ({"alpha": 0.25, "projection": "mean"}, (0.95, 1.3)),
        ({"alpha": 0.25, "gradient_engine": "func"}, (0.95, 1.3)),
        ({"alpha": 0.25, "gradient_engine": "loop"}, (0.95, 1.3)),
        # one tensor of 2 entries, one retain sample: per tensor is global here
        ({"alpha": 0.25, "projection_scope": "per_tensor"}, (0.95, 1.3)),
        # slope 2 sigmoid(0) = 1 at the reference
        ({"alpha": 0.25, "forget_loss": "npo"}, (0.95, 1.3)),
    ],
)
def test_alpha_and_sign_by_hand(settings, expected, tmp_path):
    model, trainer = toy_trainer(tmp_path, **settings)
    trainer.train()
    torch.testing.assert_close(model.theta.detach(), torch.tensor(expected))


def test_npo_second_step_by_hand(tmp_path):
    """After step 1 the forget loss is 7 + 0.1 * 25 = 9.5: slope 2 sigmoid(-2.5 beta), beta 0.4."""
    model, trainer = toy_trainer(tmp_path, projection="none", forget_loss="npo", npo_beta=0.4, max_steps=2)
    trainer.train()
    slope = 2 / (1 + torch.e ** (0.4 * 2.5))
    expected = torch.tensor([1.3, 1.4]) + 0.1 * slope * torch.tensor([3.0, 4.0])
    torch.testing.assert_close(model.theta.detach(), expected)


def test_logged_loss_is_that_of_graddiff(tmp_path):
    _, trainer = toy_trainer(tmp_path, alpha=0.25, forget_loss="ascent")
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(0.25 * 2 - 0.75 * 7)
    assert logged["forget_loss"] == 7
    assert logged["retain_loss"] == 2
    assert logged["kept_signal"] == pytest.approx(0.8)
    assert logged["grad_norm"] == pytest.approx((0.5**2 + 3**2) ** 0.5)


def test_per_tensor_scope_projects_each_tensor(tmp_path, make_model, make_samples):
    # two retain samples: with more, some small tensor has directions that float32 cannot tell from zero
    model, retain, forget = make_model("vit"), make_samples("vit", 2, seed=1), make_samples("vit", M, seed=2)

    def gradients(samples):
        rows = []
        for example in samples:
            model.zero_grad()
            model(**{key: value[None] for key, value in example.items()}).loss.backward()
            rows.append({name: p.grad.flatten().clone() for name, p in model.named_parameters()})
        model.zero_grad()
        return {name: torch.stack([row[name] for row in rows]).double() for name in rows[0]}

    retain_rows, forget_rows = gradients(retain), gradients(forget)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = OrthoGradTrainer(
        model, config(tmp_path, projection_scope="per_tensor"), train_dataset=retain, forget_dataset=forget
    )
    trainer.train()
    assert trainer.gradient_engine.name == "gram"
    for name, parameter in model.named_parameters():
        basis, _ = torch.linalg.qr(retain_rows[name].T)
        mean = forget_rows[name].mean(dim=0)
        expected = 0.1 * (mean - basis @ (basis.T @ mean))
        change = (parameter.detach() - before[name]).flatten().double()
        assert (change - expected).norm() <= 1e-3 * mean.norm() * 0.1 + 1e-6, name


@pytest.mark.parametrize("projection", ["orthogonal", "none"])
def test_resume_equals_uninterrupted(projection, tmp_path, make_model, make_samples):
    """Both streams, dropout and the NPO reference losses go on where they stopped."""

    def run(directory, resume=None, **settings):
        model = make_model("llama", dropout=0.1)
        args = config(
            directory, max_steps=7, save_strategy="steps", save_steps=3, forget_loss="npo", optim="adamw_torch",
            learning_rate=1e-2, alpha=0.3, per_device_train_batch_size=2, projection=projection, **settings,
        )  # fmt: skip
        trainer = OrthoGradTrainer(
            model,
            args,
            train_dataset=make_samples("llama", 5, seed=1),
            forget_dataset=make_samples("llama", 7, seed=2),
        )
        trainer.train(resume_from_checkpoint=resume)
        return flat(model), trainer

    whole, trainer = run(tmp_path / "whole")
    resumed, resumed_trainer = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(whole, resumed)
    history = [log for log in trainer.state.log_history if log["step"] > 3]
    resumed_history = [log for log in resumed_trainer.state.log_history if log["step"] > 3]
    assert [log["forget_loss"] for log in history if "loss" in log] == [
        log["forget_loss"] for log in resumed_history if "loss" in log
    ]
    # its cost is that of both parts
    state = json.loads((tmp_path / "whole" / "checkpoint-3" / "trainer_state.json").read_text())
    earlier = state["stateful_callbacks"]["TrainingClock"]["attributes"]["seconds"]
    runtimes = [one.state.log_history[-1]["train_runtime"] for one in (trainer, resumed_trainer)]
    for one, seconds in ((trainer, runtimes[0]), (resumed_trainer, runtimes[1] + earlier)):
        report = evaluate_unlearning(one, datasets={"forget": make_samples("llama", 2)})
        assert earlier > 0 and report.cost["unlearning"]["seconds"] == pytest.approx(seconds)
    # one that does not say it, of an earlier version, is gone on from as well
    del state["stateful_callbacks"]["TrainingClock"]
    (tmp_path / "whole" / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(state))
    run(tmp_path / "older", resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert is_whole(tmp_path / "older" / "checkpoint-6")


def test_evaluation_per_set_and_model_is_trainable_afterwards(tmp_path, make_model, make_samples):
    sets = {"forget": make_samples("whisper", 3, seed=2), "test": make_samples("whisper", 3, seed=3)}
    trainer = OrthoGradTrainer(
        make_model("whisper"),
        config(tmp_path, eval_strategy="steps", eval_steps=1, predict_with_generate=True, generation_max_length=6),
        train_dataset=make_samples("whisper", 4),
        forget_dataset=sets["forget"],
        eval_dataset=sets,
        compute_metrics=lambda prediction: {"length": float(prediction.predictions.shape[1])},
    )
    trainer.train()
    logged = {key for log in trainer.state.log_history for key in log}
    assert {"eval_forget_loss", "eval_test_loss", "eval_forget_length", "eval_test_length"} <= logged


def test_gradient_ascent_needs_no_retain_set(tmp_path, make_model, make_samples, loop_gradients):
    model, forget = make_model("vit"), make_samples("vit", M, seed=2)
    gradient, before = loop_gradients(model, forget).mean(dim=0), flat(model)
    args = config(tmp_path, projection="none", per_device_train_batch_size=M)
    trainer = OrthoGradTrainer(model, args, forget_dataset=forget)
    trainer.train()
    torch.testing.assert_close(flat(model) - before, 0.1 * gradient, rtol=1e-3, atol=1e-6)


def test_plain_arguments_are_not_changed(tmp_path):
    args = TrainingArguments(str(tmp_path), report_to="none", learning_rate=3e-4)
    before = copy.deepcopy(args.to_dict())
    trainer = OrthoGradTrainer(TwoParameters(), args)
    assert args.to_dict() == before
    assert trainer.args.learning_rate == 3e-4
    assert trainer.args is args
