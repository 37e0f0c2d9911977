"""U-LiRA by hand, and with shadow models that forget and that only seem to."""

import numpy as np
import pytest
import torch
from conftest import Samples
from peft import LoraConfig, get_peft_model
from sklearn.metrics import roc_auc_score
from torch.utils.data import ConcatDataset

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.evaluation import ShadowLosses, attack_shadows, per_sample_losses, shadow_losses, unlearning_lira


def test_ratio_by_hand():
    generator = np.random.default_rng(0)
    unlearned, unseen = generator.gamma(4.0, 0.2, (6, 5)), generator.gamma(2.0, 0.5, (6, 5))
    losses, member = generator.gamma(3.0, 0.3, 5), np.array([1, 0, 1, 0, 0])
    scores = []
    for sample in range(5):
        value, ratio = np.log(np.exp(-losses[sample]) / (1 - np.exp(-losses[sample]))), 0.0
        for sign, shadows in ((1, unlearned), (-1, unseen)):
            c = np.log(np.exp(-shadows[:, sample]) / (1 - np.exp(-shadows[:, sample])))
            mean, variance = c.mean(), c.var(ddof=1)
            ratio += sign * (-((value - mean) ** 2) / (2 * variance) - 0.5 * np.log(2 * np.pi * variance))
        scores.append(ratio)
    found = unlearning_lira(losses, member, ShadowLosses(unlearned, unseen))
    assert found.auc == pytest.approx(roc_auc_score(member, scores))
    assert (found.num_members, found.num_nonmembers) == (2, 3)


def test_missing_shadows_do_not_count():
    generator = np.random.default_rng(1)
    full = ShadowLosses(generator.gamma(4.0, 0.2, (4, 6)), generator.gamma(2.0, 0.5, (4, 6)))
    holes = np.full((3, 6), np.nan)
    padded = ShadowLosses(np.concatenate([full.unlearned, holes]), np.concatenate([holes, full.unseen]))
    losses, member = generator.gamma(3.0, 0.3, 6), np.array([1, 1, 1, 0, 0, 0])
    assert unlearning_lira(losses, member, padded) == unlearning_lira(losses, member, full)


@pytest.mark.parametrize(("left", "least", "most"), [(0.0, 0.45, 0.55), (0.5, 0.7, 1.0)])
def test_shadows_are_attacked_by_the_others(left, least, most):
    """What unlearned samples keep of a lower loss is found, though samples differ by far more than that."""
    generator = np.random.default_rng(0)
    level, number = generator.uniform(0.5, 4.0, 400), 8
    losses = level + generator.normal(0, 0.3, (number, 400)).clip(-0.4, 0.4)
    chosen = np.zeros((number, 400), dtype=bool)
    for pair in range(0, number, 2):
        chosen[pair, generator.permutation(400)[:200]] = True
        chosen[pair + 1] = ~chosen[pair]
    losses = np.where(chosen, (1 - left) * losses, losses)
    shadows = ShadowLosses(np.where(chosen, losses, np.nan), np.where(chosen, np.nan, losses))
    found = attack_shadows(shadows)
    assert len(found) == number and least < np.mean([one.auc for one in found]) < most
    # an attacker knows neither the losses of the one that is attacked nor those of its complement
    others = ShadowLosses(shadows.unlearned[2:], shadows.unseen[2:])
    own = np.where(chosen[0], shadows.unlearned[0], shadows.unseen[0])
    assert found[0] == unlearning_lira(own, chosen[0], others)
    for count in (4, 7):
        with pytest.raises(ValueError, match=f"at least 6 to attack each by the others, but holds {count}"):
            attack_shadows(ShadowLosses(shadows.unlearned[:count], shadows.unseen[:count]))


def test_method_that_does_nothing_is_found_out(make_model, make_samples, tmp_path):
    """Labels are noise here, so that a low loss means that a sample was trained on."""
    start, retain = make_model("vit"), make_samples("vit", 12, seed=9)
    forget, unseen = make_samples("vit", 10, seed=1), make_samples("vit", 10, seed=2)
    before = [parameter.clone() for parameter in start.parameters()]
    candidates = Samples([*forget.examples, *unseen.examples])
    member = np.arange(20) < 10
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "fc1", "fc2", "classifier"])

    def trainer(model, **sets):
        args = OrthoGradConfig(
            str(tmp_path), max_steps=60, learning_rate=2e-2, per_device_train_batch_size=22, save_strategy="no",
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        return OrthoGradTrainer(model, args, **sets)

    def train(model, half):
        done = trainer(model, train_dataset=ConcatDataset([half, retain]))
        done.train()
        return done.model

    def losses(model):
        return per_sample_losses(trainer(model), candidates)

    halves = []

    def keep(model, half):  # forgets nothing
        halves.append(len(half))
        return model

    shadows = shadow_losses(
        start, candidates, train=train, unlearn=keep, losses=losses, num_shadows=8, lora_config=config
    )
    assert halves == [10] * 8
    assert (np.isnan(shadows.unlearned) != np.isnan(shadows.unseen)).all()
    assert (np.isfinite(shadows.unlearned).sum(0) == 4).all()
    # the models in question are trained as the shadows are
    trained, never = (losses(train(get_peft_model(make_model("vit"), config), rows)) for rows in (forget, Samples([])))
    assert unlearning_lira(trained, member, shadows).auc > 0.9
    assert 0.2 < unlearning_lira(never, member, shadows).auc < 0.8
    assert all(torch.equal(*pair) for pair in zip(start.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="`num_shadows` must be even and at least 4, but is 5"):
        shadow_losses(start, candidates, train=train, unlearn=keep, losses=losses, num_shadows=5)
