"""Regressions that a reading of the code found, each against an independent path."""

import pytest
import torch
from conftest import MODELS, Samples
from datasets import Dataset
from engines import forget_batch, retain_batch, weighed
from launched import samples

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.baselines import BadTeacherTrainer, RandomLabelTrainer, ScrubTrainer, UndialTrainer
from hf_orthograd.gradients import GramEngine, LoopEngine
from hf_orthograd.gradients.products import inner_products
from hf_orthograd.parallel import Parameters
from hf_orthograd.projection import solve_projections


class Delta(torch.nn.Module):
    """Two parameters that only ever meet in their sum: autograd has one gradient tensor for both."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (torch.nn.Parameter(torch.randn(3, 4)) for _ in range(2))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.first + self.second)


def square_losses(model, inputs):
    return model(inputs["x"]).square().sum(-1)


@pytest.mark.parametrize("batches", [1, 2])
def test_parameters_that_share_a_gradient_get_one_each(batches):
    torch.manual_seed(0)
    model = Delta()
    parameters = Parameters(dict(model.named_parameters()), {})
    data = [{"x": torch.randn(3, 4)} for _ in range(2 * batches)]
    forget, retain = [forget_batch(one) for one in data[:batches]], [retain_batch(one) for one in data[batches:]]
    found = []
    for engine_class in (GramEngine, LoopEngine):
        step = engine_class(parameters, square_losses).measure(model, forget, retain)
        coefficients = dict.fromkeys(parameters.projected, torch.linspace(-1, 1, 3 * batches))
        update = step.combine(weighed(-0.4, 0.6, coefficients))
        found.append(torch.autograd.grad(update, list(parameters.projected.values())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[1][0], found[1][1])


def test_products_of_half_precision_rows_are_not_rounded():
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(1, 40000, generator=generator) + 0.05 * torch.randn(4, 40000, generator=generator)).bfloat16()
    expected = rows.double() @ rows.double().T
    # rounded to bfloat16 they would be off by 4e-3
    assert ((inner_products(rows, rows) - expected).abs() / expected.abs().max()).max() < 1e-5


def settings(tmp_path, **changes):
    defaults = {
        "max_steps": 2, "per_device_train_batch_size": 4, "per_device_forget_batch_size": 4, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1,
    }  # fmt: skip
    return OrthoGradConfig(str(tmp_path), **(defaults | changes))


def sets(kind="vit"):
    return {"train_dataset": samples(kind, 8, seed=1), "forget_dataset": samples(kind, 8, seed=2)}


def test_sampling_by_length(tmp_path):
    def rows(first):
        texts = [[first + n, 5, 6, 7][: 2 + n % 3] for n in range(8)]
        return Dataset.from_list([{"input_ids": ids, "labels": ids, "length": len(ids)} for ids in texts])

    def pad(examples):
        longest = max(len(example["input_ids"]) for example in examples)
        fill = {"input_ids": 0, "labels": -100}
        return {
            name: torch.tensor([e[name] + [value] * (longest - len(e[name])) for e in examples])
            for name, value in fill.items()
        }

    args = settings(tmp_path, train_sampling_strategy="group_by_length")
    given = {"train_dataset": rows(10), "forget_dataset": rows(30)}
    trainer = OrthoGradTrainer(MODELS["llama"](), args, pad, **given)
    trainer.train()
    assert trainer.state.global_step == 2


class Noisy(Samples):
    """A transform that varies a row anew each time it is read."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        return {**row, "pixel_values": row["pixel_values"] + torch.randn(3, 16, 16)}


def test_rows_that_are_varied_anew_are_not_taken_for_coupled(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")

    given = {name: Noisy(rows.examples) for name, rows in sets().items()}
    trainer = OrthoGradTrainer(MODELS["vit"](), settings(tmp_path), **given, compute_loss_func=loss)
    trainer.train()
    assert trainer.state.global_step == 2


def test_arguments_that_change_after_the_trainer_was_made(tmp_path):
    """As in a loop over settings: what watches the run follows, and what is out of range is refused."""
    trainer = OrthoGradTrainer(MODELS["vit"](), settings(tmp_path, forget_loss="ascent"), **sets())
    trainer.args.forget_loss, trainer.args.projection_target = "npo", "update"
    trainer.train()
    assert trainer.state.log_history[0]["update_kept"] <= 1 + 1e-6
    trainer.args.alpha = 2.0
    with pytest.raises(ValueError, match="`alpha` must be a finite number from 0 to 1, but is 2.0"):
        trainer.train()


class Interrupted(OrthoGradTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step == 0 and self.is_in_train and not getattr(self, "was_interrupted", False):
            self.was_interrupted = True
            raise KeyboardInterrupt
        return loss


def test_a_run_that_broke_off_leaves_nothing_to_the_next(tmp_path):
    trainer = Interrupted(MODELS["vit"](), settings(tmp_path, monitor_steps=2), **sets())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert trainer.state.global_step == 2


def test_references_of_another_forget_set_are_refused(tmp_path):
    args = settings(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    OrthoGradTrainer(MODELS["vit"](), args, **sets()).train()
    other = {**sets(), "forget_dataset": samples("vit", 11, seed=5)}
    later = OrthoGradTrainer(MODELS["vit"](), args, **other)
    with pytest.raises(ValueError, match="reference losses of 8 rows, but `forget_dataset` has 11"):
        later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_an_overflow_under_per_tensor_is_no_signal():
    grams = {"a": torch.eye(3, dtype=torch.float64), "b": torch.full((3, 3), torch.nan, dtype=torch.float64)}
    assert solve_projections(grams).metrics == {}


def test_saliency_masks_belong_to_one_run(tmp_path):
    def model_init():
        torch.manual_seed(3)
        return MODELS["vit"]()

    trainer = RandomLabelTrainer(
        None, settings(tmp_path, learning_rate=1e-2), model_init=model_init, saliency=0.1, **sets()
    )
    shares = []
    for _ in range(2):
        trainer.train()
        start = model_init()
        moved = [(a != b).flatten() for a, b in zip(trainer.model.parameters(), start.parameters(), strict=True)]
        shares.append(torch.cat(moved).float().mean().item())
    assert shares[0] == shares[1] and 0 < shares[0] < 0.12


class RunsOut(RandomLabelTrainer):
    """A device that has no room for the first step of four samples."""

    masks_in_steps = ()

    def training_step(self, *args, **kwargs):
        if self._train_batch_size == 4:
            raise RuntimeError("CUDA out of memory.")
        self.masks_in_steps += (max(len(one._backward_hooks or ()) for one in self.model.parameters()),)
        return super().training_step(*args, **kwargs)


def test_a_run_that_begins_again_masks_once(tmp_path):
    trainer = RunsOut(MODELS["vit"](), settings(tmp_path, auto_find_batch_size=True), saliency=0.1, **sets())
    trainer.train()
    assert trainer.masks_in_steps == (1, 1)
    assert not any(one._backward_hooks for one in trainer.model.parameters())


def test_teachers_need_a_retain_set(tmp_path):
    args = settings(tmp_path, alpha=0.0, projection="none")
    with pytest.raises(ValueError, match="ScrubTrainer holds on to retain samples, but `train_dataset` has none"):
        ScrubTrainer(MODELS["vit"](), args, forget_dataset=samples("vit", 8, seed=2))


@pytest.mark.parametrize(
    ("trainer_class", "named"),
    [(ScrubTrainer, {"alpha"}), (BadTeacherTrainer, {"alpha", "retain_loss"}), (UndialTrainer, set())],
)
def test_a_baseline_warns_of_settings_that_it_does_not_read(trainer_class, named, tmp_path, caplog):
    trainer_class(MODELS["vit"](), settings(tmp_path, alpha=0.7, retain_loss="kl", projection="none"), **sets())
    assert {name for name in ("alpha", "retain_loss") if f"does not read `{name}`" in caplog.text} == named
    caplog.clear()
    trainer_class(MODELS["vit"](), settings(tmp_path, projection="none"), **sets())
    assert "does not read" not in caplog.text


def test_baselines_take_no_arguments_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = ScrubTrainer(MODELS["vit"](), **sets())
    assert (trainer.args.projection, trainer.args.forget_loss) == ("none", "ascent")


def test_an_estimate_counts_the_samples_of_all_micro_batches(tmp_path):
    args = settings(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    estimate = OrthoGradTrainer(MODELS["vit"](), args, **sets()).estimate()
    assert (estimate.forget_samples, estimate.retain_samples) == (16, 8)
