"""What a step asks of an accelerator, counted on a CPU: where it would wait, and how many kernels it launches."""

from collections import Counter

import pytest
import torch
import transformers
from conftest import MODELS
from launched import samples
from stalls import CountStalls

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.gradients.products import exact_arithmetic, inner_products


class Counting(OrthoGradTrainer):
    """Counts within the training steps, from the batches to `p.grad`."""

    def training_step(self, *args, **kwargs):
        self.counted = CountStalls()
        with self.counted:
            return super().training_step(*args, **kwargs)


def counted_step(tmp_path, model, kind, **settings):
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_forget_batch_size": 4,
        "monitor_steps": 0,
    }
    args = OrthoGradConfig(
        str(tmp_path), report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, **(defaults | settings)
    )
    sets = {"train_dataset": samples(kind, 8, seed=1), "forget_dataset": samples(kind, 8, seed=2)}
    trainer = Counting(model, args, **sets)
    trainer.train()
    return trainer.counted


def deep_vit(layers):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=48, image_size=16,
        patch_size=4, num_labels=5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize("kind", ["vit", "whisper", "llama"])
@pytest.mark.parametrize("forget_loss", ["npo", "ascent"])
def test_a_step_waits_for_the_device_at_most_twice(kind, forget_loss, tmp_path):
    own = counted_step(tmp_path, MODELS[kind](), kind, forget_loss=forget_loss)
    # less those of the model itself, as where it looks at its attention mask, which any trainer has
    own.stalls -= counted_step(tmp_path, MODELS[kind](), kind, projection="none").stalls - Counter(cpu=1)
    assert 1 <= sum(own.stalls.values()) <= 2, own.stalls


def test_waits_do_not_grow_with_the_model(tmp_path):
    few, many = (counted_step(tmp_path, deep_vit(layers), "vit") for layers in (1, 6))
    assert few.stalls == many.stalls


def test_kernels_are_as_many_as_layers_and_not_as_columns(tmp_path):
    """Against GradDiff on the same batches: a fixed number for each layer, whatever its width."""
    plain = [counted_step(tmp_path, deep_vit(n), "vit", projection="none").kernels for n in (2, 4)]
    own = [counted_step(tmp_path, deep_vit(n), "vit").kernels for n in (2, 4)]
    assert (own[1] - own[0]) <= 1.5 * (plain[1] - plain[0])
    wide, narrow = (torch.randn(4, columns) for columns in (1 << 20, 1 << 14))
    counts = []
    for rows in (wide, narrow):
        counter = CountStalls()
        with counter:
            inner_products(rows, rows)
        counts.append(counter.kernels)
        assert not counter.stalls
    assert counts[0] == counts[1] <= 8


def test_the_counter_counts():
    counter, numbers = CountStalls(), torch.arange(4.0)
    with counter:
        numbers.sum().item()
        bool(numbers[0] > 1)
        numbers.nonzero()
        on_host = numbers.cpu()
        on_host.sum().item()  # the host's own
        (on_host * 2).tolist()
    assert sum(counter.stalls.values()) == 4, counter.stalls


@pytest.mark.parametrize("columns", [5, 1 << 13, (1 << 15) + 3, 3_000_000])
def test_inner_products_are_exact_to_one_part_in_a_million(columns):
    generator = torch.Generator().manual_seed(0)
    rows, others = (torch.randn(n, columns, generator=generator) + 0.1 for n in (5, 3))
    expected = rows.double() @ others.double().T
    scale = rows.double().norm(dim=1)[:, None] * others.double().norm(dim=1)
    assert ((inner_products(rows, others) - expected).abs() / scale).max() <= 1e-6


def test_products_are_exact_whatever_the_process_allows():
    """TF32 and bfloat16 inside of float32 products are off where inner products are taken, and on again after."""
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        with exact_arithmetic(torch.device("cpu")):
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "bf16"
        with pytest.raises(ZeroDivisionError), exact_arithmetic(torch.device("cpu")):
            _ = 1 / 0
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before
