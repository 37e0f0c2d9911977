"""Samples are counted by their rows: the first dimension of a tensor need not be theirs."""

import pytest
import torch
from test_bad_inputs import WithPatches, collate_patches, patch_loss, patches

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("projection", ["orthogonal", "mean", "none"])
def test_a_tensor_of_all_patches_comes_first(engine, projection, tmp_path):
    """As in Qwen2-VL: divided by the number of patches, the forget gradient would be several times too small."""
    torch.manual_seed(0)
    model, forget, retain = WithPatches(), patches(6, 2), patches(6, 1)
    args = OrthoGradConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=6, per_device_forget_batch_size=6, alpha=0.0, optim="sgd",
        learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant", forget_loss="ascent", projection=projection,
        gradient_engine=engine, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip

    def gradients(rows):
        found = []
        for row in rows.examples:
            model.zero_grad()
            batch = collate_patches([row])
            patch_loss(model(batch["pixel_values"], batch["grid"]), batch["labels"]).sum().backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())
        model.zero_grad()
        return torch.stack(found)

    ascended, kept = gradients(forget).mean(0), gradients(retain)
    basis = {"orthogonal": kept, "mean": kept.mean(0, keepdim=True), "none": kept[:0]}[projection]
    if len(basis):
        q, _ = torch.linalg.qr(basis.T)
        ascended = ascended - q @ (q.T @ ascended)
    before = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
    OrthoGradTrainer(
        model, args, collate_patches, train_dataset=retain, forget_dataset=forget, compute_loss_func=patch_loss
    ).train()
    step = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    torch.testing.assert_close(step, ascended, rtol=1e-4, atol=1e-5)
