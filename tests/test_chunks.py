"""Retain batches in chunks: the same Gram matrix and update, dropout included, from the memory of one chunk."""

import numpy as np
import pytest
import torch
from engines import forget_batch, retain_batch, weighed
from torch.utils.data import default_collate

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.gradients import GramEngine, LoopEngine
from hf_orthograd.gradients.gram.chunks import RepeatedGradients
from hf_orthograd.gradients.gram.engine import KeptGradients
from hf_orthograd.objectives import PerSampleLoss
from hf_orthograd.parallel import Parameters
from hf_orthograd.trials import RandomState


def batch(samples):
    return default_collate(samples.examples)


def split_parameters(model):
    everything = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = {name: p for name, p in everything.items() if "norm" in name}
    return Parameters({name: p for name, p in everything.items() if name not in others}, others)


def combined(step, parameters, num_samples):
    coefficients = dict.fromkeys(parameters.projected, torch.linspace(-1, 1, num_samples))
    loss = step.combine(weighed(-0.4, 0.6, coefficients))
    return torch.autograd.grad(loss, list(parameters.trainable.values()), materialize_grads=True)


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2", "vit", "llama"])
def test_chunks_give_the_gram_matrix_and_update_of_the_whole(kind, make_model, make_samples):
    forget, retain = batch(make_samples(kind, 3, seed=2)), batch(make_samples(kind, 7, seed=1))
    model = make_model(kind).eval()
    parameters, losses = split_parameters(model), PerSampleLoss(model)
    forwards = []

    def counted(model, inputs):
        forwards.append(len(inputs["labels"]))
        return losses(model, inputs)

    step = GramEngine(parameters, counted, chunk_size=2).measure(model, [forget_batch(forget)], [retain_batch(retain)])
    expected = LoopEngine(parameters, losses).measure(model, [forget_batch(forget)], [retain_batch(retain)])
    assert isinstance(step, RepeatedGradients)
    assert forwards[:2] == [3, 2]  # the forget batch, and a look at how parameters are used
    assert set(forwards[2:]) == {1}  # a quarter of a chunk, but a sample at least
    assert len(forwards[2:]) % 7 == 0 and len(forwards[2:]) >= 2 * 7  # all of them for each group
    norms = expected.gram.diagonal().sqrt()
    assert ((step.gram - expected.gram).abs() / torch.outer(norms, norms)).max() <= 1e-5
    torch.testing.assert_close(step.retain_losses, expected.retain_losses)
    gradients, expected = combined(step, parameters, 7), combined(expected, parameters, 7)
    scale = max(gradient.abs().max().item() for gradient in expected)
    for name, one, other in zip(parameters.trainable, gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("kind", ["wav2vec2", "llama"])
def test_every_pass_over_a_chunk_drops_out_the_same(kind, make_model, make_samples):
    """w^T K w is the squared norm of the update only if all groups and the update saw the same dropout masks."""
    forget, retain = batch(make_samples(kind, 3, seed=2)), batch(make_samples(kind, 6, seed=1))
    model = make_model(kind, dropout=0.2).train()
    parameters = Parameters(split_parameters(model).trainable, {})
    torch.manual_seed(5)
    np.random.seed(5)
    step = GramEngine(parameters, PerSampleLoss(model), chunk_size=2).measure(
        model, [forget_batch(forget)], [retain_batch(retain)]
    )
    after = RandomState.now()
    assert isinstance(step, RepeatedGradients)
    squared = sum(gradient.double().square().sum() for gradient in combined(step, parameters, 6))
    weights = torch.cat((torch.tensor([-0.4]), torch.linspace(-1, 1, 6) + 0.1)).double()
    torch.testing.assert_close(squared, weights @ step.gram @ weights, rtol=1e-4, atol=0)
    assert torch.equal(RandomState.now().cpu, after.cpu)


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2", "vit", "llama"])
def test_any_grouping_gives_the_same(kind, monkeypatch, make_model, make_samples):
    """One parameter at a time: a kernel's two factors, a weight and its bias, fall into different groups."""
    monkeypatch.setattr(GramEngine, "_group", lambda self, *_: [[n] for n in self.parameters.trainable])
    forget, retain = batch(make_samples(kind, 2, seed=2)), batch(make_samples(kind, 4, seed=1))
    model = make_model(kind).eval()
    parameters, losses = Parameters(split_parameters(model).trainable, {}), PerSampleLoss(model)
    found = (
        GramEngine(parameters, losses, chunk_size=2)
        .measure(model, [forget_batch(forget)], [retain_batch(retain)], per_parameter=True)
        .grams
    )
    expected = (
        LoopEngine(parameters, losses)
        .measure(model, [forget_batch(forget)], [retain_batch(retain)], per_parameter=True)
        .grams
    )
    scale = max(gram.abs().max().item() for gram in expected.values())
    for name, gram in expected.items():
        torch.testing.assert_close(found[name], gram, rtol=1e-4, atol=1e-8 * scale, msg=name)


def test_small_gradients_take_one_pass(make_model, make_samples):
    model = make_model("llama").eval()
    parameters = Parameters({n: p for n, p in model.named_parameters() if n.endswith("norm.weight")}, {})
    forget, retain = batch(make_samples("llama", 3, seed=2)), batch(make_samples("llama", 6, seed=1))
    forwards, losses = [], PerSampleLoss(model)

    def counted(model, inputs):
        forwards.append(len(inputs["labels"]))
        return losses(model, inputs)

    step = GramEngine(parameters, counted, chunk_size=3).measure(model, [forget_batch(forget)], [retain_batch(retain)])
    expected = LoopEngine(parameters, losses).measure(model, [forget_batch(forget)], [retain_batch(retain)])
    torch.testing.assert_close(step.gram, expected.gram, rtol=1e-4, atol=1e-8)
    assert isinstance(step, KeptGradients)
    assert forwards == [3, 3, 3, 3]  # the forget batch, a look at how parameters are used, two chunks


def test_training_in_chunks_is_training(tmp_path, make_model, make_samples):
    """Two steps with dropout: the same parameters up to the rounding of float32."""
    retain, forget = make_samples("llama", 12, seed=1), make_samples("llama", 3, seed=2)
    changes = []
    for chunk_size in (None, 6, 2):
        model = make_model("llama")
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        args = OrthoGradConfig(
            str(tmp_path), retain_chunk_size=chunk_size, per_device_train_batch_size=6, max_steps=2, optim="sgd",
            per_device_forget_batch_size=3, learning_rate=0.1, lr_scheduler_type="constant", report_to="none",
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        OrthoGradTrainer(model, args, train_dataset=retain, forget_dataset=forget).train()
        changes.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - before)
    assert changes[0].norm() > 1e-3
    for change in changes[1:]:
        torch.testing.assert_close(change, changes[0], rtol=1e-3, atol=1e-5 * changes[0].abs().max().item())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"projection": "mean"}, "`projection` to be orthogonal, but it is 'mean'"),
        ({"projection_scope": "per_tensor"}, "`projection_scope` to be global"),
        ({"gradient_engine": "func"}, "`gradient_engine` to be auto or gram, but it is 'func'"),
    ],
)
def test_chunks_refuse_what_needs_every_gradient(settings, named, tmp_path):
    with pytest.raises(ValueError, match="`retain_chunk_size` is 4.*") as raised:
        OrthoGradConfig(str(tmp_path), retain_chunk_size=4, **settings)
    assert named in str(raised.value)
