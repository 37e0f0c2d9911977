"""What is guaranteed of the step that AdamW makes, checked sample by sample with an independent loop."""

import pytest
import torch
from transformers import TrainerCallback

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.callbacks.correction import solve_correction


K = 5


class Watch(TrainerCallback):
    """For every step, the cosines of the parameters' change with each retain gradient before it."""

    def __init__(self, model, retain, loop_gradients):
        self.model, self.retain, self.loop_gradients = model, retain, loop_gradients
        self.cosines = []

    def flat(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters() if p.requires_grad]).double()

    def on_step_begin(self, args, state, control, **kwargs):
        self.rows = self.loop_gradients(self.model, self.retain).double()
        self.before = self.flat()

    def on_step_end(self, args, state, control, **kwargs):
        change = self.flat() - self.before
        assert change.norm() > 0
        self.cosines.append(torch.nn.functional.cosine_similarity(change[None], self.rows))


def watched_run(tmp_path, make_model, make_samples, loop_gradients, kind="llama", **settings):
    model, retain, forget = make_model(kind), make_samples(kind, K, seed=1), make_samples(kind, 3, seed=2)
    watch = Watch(model, retain, loop_gradients)
    defaults = {
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "learning_rate": 1e-3,
        "max_steps": 20,
        "per_device_train_batch_size": K,
        "per_device_forget_batch_size": 3,
        "forget_loss": "npo",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    args = OrthoGradConfig(str(tmp_path), **(defaults | settings))
    trainer = OrthoGradTrainer(model, args, train_dataset=retain, forget_dataset=forget, callbacks=[watch])
    trainer.train()
    return torch.stack(watch.cosines), trainer


# with a larger alpha the retain mean alone improves every sample, and nothing is left to correct
@pytest.mark.parametrize(
    ("kind", "alpha"),
    [
        ("whisper", 0.0),
        pytest.param("whisper", 0.02, marks=pytest.mark.slow),
        *[(kind, alpha) for kind in ("vit", "llama") for alpha in (0.0, 0.02)],
    ],
)
def test_no_retain_sample_becomes_worse_in_any_of_20_adamw_steps(
    kind, alpha, tmp_path, make_model, make_samples, loop_gradients
):
    run = (tmp_path, make_model, make_samples, loop_gradients, kind)
    cosines, trainer = watched_run(*run, alpha=alpha, projection_target="update")
    assert len(cosines) == 20
    worst = cosines.abs().max() if alpha == 0 else cosines.max()
    assert worst <= 1e-4
    logged = [entry for entry in trainer.state.log_history if "update_kept" in entry]
    assert len(logged) == 20
    assert all(0 < entry["update_kept"] <= 1 + 1e-6 and entry["update_residual"] <= 1e-4 for entry in logged)
    # the same check fails where only the gradient is projected
    cosines, _ = watched_run(*run, alpha=alpha, projection_target="gradient", max_steps=5)
    assert (cosines.abs().max() if alpha == 0 else cosines.max()) > 1e-2


@pytest.mark.parametrize("engine", ["gram", "loop"])
def test_correction_works_with_every_engine_and_optimizer(engine, tmp_path, make_model, make_samples, loop_gradients):
    for optimizer in ("sgd", "adafactor"):
        cosines, _ = watched_run(
            *(tmp_path, make_model, make_samples, loop_gradients, "vit"),
            **{"alpha": 0.0, "projection_target": "update", "gradient_engine": engine, "optim": optimizer},
            max_steps=3,
        )
        assert cosines.abs().max() <= 1e-4


def test_correction_is_the_smallest_by_hand():
    """Rows (1, 0) and (0, 1): a step (2, -3) may not go up the first, and may go down the second."""
    gram, products = torch.eye(2), torch.tensor([2.0, -3.0])
    coefficients, left = solve_correction(gram, products, equality=False)
    assert coefficients.tolist() == pytest.approx([2, 0]) and left.tolist() == pytest.approx([0, -3])
    coefficients, left = solve_correction(gram, products, equality=True)
    assert coefficients.tolist() == pytest.approx([2, -3]) and left.tolist() == pytest.approx([0, 0])


def test_correction_satisfies_the_optimality_conditions():
    """c >= 0, no product above zero, and c_i > 0 only where the product is zero: duplicates and a zero row included."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    rows = torch.cat((rows, rows[:2], torch.zeros(1, 40, dtype=torch.float64)))
    step = rows[:6].sum(dim=0) + torch.randn(40, generator=generator, dtype=torch.float64)
    coefficients, left = solve_correction(rows @ rows.T, rows @ step, equality=False)
    corrected = rows @ (step - coefficients @ rows)
    torch.testing.assert_close(corrected, left)
    scale = (rows @ step).abs().max()
    assert coefficients.min() >= 0
    assert left.max() <= 1e-9 * scale
    assert (coefficients * left).abs().max() <= 1e-9 * scale


def test_update_needs_the_projection_it_corrects(tmp_path):
    with pytest.raises(ValueError, match="`projection_target` is 'update'.*'none' and 'global'"):
        OrthoGradConfig(str(tmp_path), projection_target="update", projection="none")
