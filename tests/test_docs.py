"""What the guides show runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from conftest import MODELS
from datasets import Dataset
from launched import samples
from test_architectures import ARCHITECTURES

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer


DOCS = Path(__file__).parent.parent / "docs"


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.S)


def test_a_method_of_ones_own(tmp_path):
    (code,) = [block for block in blocks("how_it_works.md") if "FlooredAscent" in block]
    names = {}
    exec(code, names)
    model = MODELS["vit"]()
    args = OrthoGradConfig(
        str(tmp_path), max_steps=1, projection="none", optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
        lr_scheduler_type="constant", per_device_train_batch_size=4, per_device_forget_batch_size=4, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=1,
    )  # fmt: skip
    sets = {"train_dataset": samples("vit", 4, seed=1), "forget_dataset": samples("vit", 4, seed=2)}

    def mean_loss(rows):
        losses = [model(**{name: value[None] for name, value in row.items()}).loss for row in rows]
        return torch.stack(losses)

    expected = mean_loss(sets["train_dataset"]).mean() - mean_loss(sets["forget_dataset"]).clamp(max=5.0).mean()
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    trainer = names["FlooredAscent"](model, args, **sets)
    trainer.train()
    for start, gradient, parameter in zip(before, gradients, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), start - 0.1 * gradient, rtol=1e-3, atol=1e-6)
    assert trainer.state.log_history[0]["forget_loss"] == pytest.approx(mean_loss_of(before, sets, model), rel=1e-3)


def mean_loss_of(start, sets, model):
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), start, strict=True):
            parameter.copy_(value)
        losses = [model(**{name: value[None] for name, value in row.items()}).loss for row in sets["forget_dataset"]]
    return torch.stack(losses).clamp(max=5.0).mean().item()


def test_retain_samples_are_varied_anew_and_alike(tmp_path):
    """Each time a row is read it is another; within a step the model and its start read the same."""
    (code,) = [block for block in blocks("how_it_works.md") if "VaryImages" in block]
    examples = samples("vit", 8, seed=1).examples
    columns = {name: [example[name].tolist() for example in examples] for name in examples[0]}
    names = {"retain": Dataset.from_dict(columns)}
    exec(code, names)
    varied = names["retain"]
    assert len({float(varied[0]["pixel_values"].flatten()[0]) for _ in range(20)}) > 2
    args = OrthoGradConfig(
        str(tmp_path), max_steps=1, retain_loss="kl", per_device_train_batch_size=8, report_to="none", logging_steps=1,
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    forget = samples("vit", 8, seed=2).examples
    forget = Dataset.from_dict({name: [example[name].tolist() for example in forget] for name in columns})
    trainer = OrthoGradTrainer(MODELS["vit"](), args, train_dataset=varied, forget_dataset=forget.with_format("torch"))
    trainer.train()
    assert next(entry for entry in trainer.state.log_history if "loss" in entry)["retain_divergence"] < 1e-6


def test_table_of_models_is_that_of_the_test():
    text = (DOCS / "modalities.md").read_text()
    followed = text[text.index("## Models that are followed exactly") : text.index("## Models with a condition")]
    assert set(re.findall(r"`(\w+(?:For[A-Z]\w+|LMHeadModel))`", followed)) == set(ARCHITECTURES)
