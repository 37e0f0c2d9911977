"""The attacker of a report: how it trains, and what its curve is of."""

import pytest
import torch

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.evaluation import Relearning, evaluate_unlearning, per_sample_losses


def test_the_attacker_relearns_by_the_users_loss_and_by_adamw(make_model, make_samples, tmp_path):
    """Whatever the unlearning run was optimised by, and though its loss is one for each sample."""
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append(labels.shape)
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")

    args = OrthoGradConfig(str(tmp_path), report_to="none", use_cpu=True, optim="adafactor", weight_decay=0.3)
    sets = {"train_dataset": make_samples("vit", 4, seed=1), "forget_dataset": make_samples("vit", 4, seed=2)}
    trainer = OrthoGradTrainer(make_model("vit"), args, **sets, compute_loss_func=loss)
    attack = Relearning(make_samples("vit", 4, seed=3), trainer, max_steps=1, learning_rate=0.01, batch_size=4)
    model = trainer.model
    attacked = attack(model)
    assert seen  # the plain loss of the model would not have come here
    # one step of AdamW moves each number with a gradient by the rate, and decays nothing
    moved = [(a - b).abs().max().item() for a, b in zip(attacked.parameters(), model.parameters(), strict=True)]
    assert max(moved) == pytest.approx(0.01, rel=1e-2)
    assert attack.name == "relearning" and trainer.args.optim == "adafactor"


def test_the_curve_is_of_what_the_attacker_has_not(make_model, make_samples, tmp_path):
    args = OrthoGradConfig(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = OrthoGradTrainer(make_model("vit"), args)
    forgotten, rest = make_samples("vit", 6, seed=2), make_samples("vit", 3, seed=5)
    settings = {"max_steps": 2, "learning_rate": 0.01, "batch_size": 4, "steps": (1,)}
    attacks = [
        Relearning(forgotten, trainer, **settings, name="all of it"),
        Relearning(forgotten, trainer, **settings, measured=rest, name="the rest"),
    ]
    report = evaluate_unlearning(trainer, attacks=attacks, datasets={"forget": forgotten})
    curves = {name: curve["unlearned"] for name, curve in report.relearning.items()}
    assert [point.step for point in curves["the rest"]] == [point.step for point in curves["all of it"]] == [0, 1, 2]
    for name, rows in {"all of it": forgotten, "the rest": rest}.items():
        attacked = attacks[list(curves).index(name)](trainer.model)
        before, after = (
            per_sample_losses(OrthoGradTrainer(model, args), rows).mean() for model in (trainer.model, attacked)
        )
        assert (curves[name][0].loss, curves[name][-1].loss) == pytest.approx((before, after), rel=1e-5)
    models = {"original": trainer.model, "reference": make_model("vit"), "datasets": {"forget": forgotten}}
    report = evaluate_unlearning(trainer, attacks=attacks, **models)
    known = {
        name: [curve[m][0].value for m in ("unlearned", "reference")] for name, curve in report.relearning.items()
    }
    for name, (start, end) in known.items():  # the original is the unlearned one here: nothing was forgotten
        half = (start + end) / 2
        steps = {
            m: next((p.step for p in curve if p.value >= half), None) for m, curve in report.relearning[name].items()
        }
        assert report.recovery_steps[name] == steps
    with pytest.raises(ValueError, match="`measured` is empty"):
        Relearning(forgotten, trainer, **settings, measured=[])
