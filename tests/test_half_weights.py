"""Parameters that are held in bfloat16, as `from_pretrained` gives what was saved so."""

import logging

import pytest
import torch
from conftest import MODELS
from launched import samples
from transformers import TrainerCallback

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer


class Gradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.taken = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("kind", ["llama", "whisper"])
def test_the_step_is_orthogonal_to_every_retain_gradient(kind, engine, tmp_path, loop_gradients, caplog):
    torch.manual_seed(0)
    model = MODELS[kind]().to(torch.bfloat16)
    retain, forget = samples(kind, 8, seed=1), samples(kind, 8, seed=2)
    for rows in (retain, forget):
        for row in rows.examples:
            row.update({name: value.bfloat16() for name, value in row.items() if value.is_floating_point()})
    seen = Gradient()
    args = OrthoGradConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=8, per_device_forget_batch_size=8, alpha=0.0, optim="sgd",
        learning_rate=0.1, max_grad_norm=0.0, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
        gradient_engine=engine, forget_loss="ascent",
    )  # fmt: skip
    trainer = OrthoGradTrainer(model, args, train_dataset=retain, forget_dataset=forget, callbacks=[seen])
    rows = loop_gradients(model, retain).float()
    plain = -loop_gradients(model, forget).float().mean(0)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.gradient_engine.name == ("gram" if engine == "auto" else "loop")
    assert "are held in bfloat16" in caplog.text
    taken = torch.cat(
        [seen.taken.get(n, torch.zeros_like(p)).flatten() for n, p in model.named_parameters() if p.requires_grad]
    ).float()
    assert taken.dtype == torch.float32 and all(g.dtype == torch.bfloat16 for g in seen.taken.values())
    cosines = torch.cosine_similarity(taken[None], rows)
    assert cosines.abs().max() <= 2e-2
    # without the projection it would not be
    assert torch.cosine_similarity(plain[None], rows).abs().max() > 5e-2
