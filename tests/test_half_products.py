"""Products of factors that mixed precision left in half precision."""

from dataclasses import replace

import pytest
import torch
from engines import weighed
from test_gradients import batch, measure, relative_error, trainable

from hf_orthograd.gradients import GramEngine, products
from hf_orthograd.gradients.gram import accumulation, forms
from hf_orthograd.gradients.gram.forms import Use, count_cost
from hf_orthograd.objectives import PerSampleLoss


class Shape:
    """As much of a parameter as a count of costs looks at."""

    def __init__(self, device, *shape):
        self.device, self.shape = torch.device(device), torch.Size(shape)

    def numel(self):
        return self.shape.numel()


@pytest.mark.parametrize(
    ("device", "halves", "positions", "pairwise"),
    [
        ("cpu", True, 2048, False),
        ("cuda", False, 2048, False),
        ("cuda", True, 2048, True),
        ("cuda", True, 8192, False),
    ],
)
def test_pairs_of_positions_are_cheap_where_matrix_units_multiply_them(
    device, halves, positions, pairwise, monkeypatch
):
    """16 samples of 128 and of 512 tokens, and a layer of a language model of 1 B parameters."""
    use = Use(positions, factors=True, one_hot=False, half=torch.bfloat16 if halves else None)
    monkeypatch.setattr(forms, "sums_in_float32", lambda device, dtype: True)
    assert count_cost(Shape(device, 2048, 8192), [use], 16).pairwise == pairwise
    monkeypatch.setattr(forms, "sums_in_float32", lambda device, dtype: False)
    assert not count_cost(Shape(device, 2048, 8192), [use], 16).pairwise


def test_exact_arithmetic_is_without_autocast_and_graph():
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(KeyError), products.exact_arithmetic(torch.device("cpu")):
            assert not torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
            raise KeyError
        assert torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


@pytest.mark.parametrize("pairwise", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("kind", ["whisper", "llama", "vit"])
def test_halves_are_multiplied_as_they_are_where_a_device_sums_in_float32(
    kind, keeps, pairwise, make_model, make_samples, monkeypatch
):
    """The device is played by float64 here: what it is given, and what becomes of that, is the same as of float32 copies."""
    forget, retain = batch(make_samples(kind, 3, seed=2)), batch(make_samples(kind, 4, seed=1))
    model, weights, given = make_model(kind).eval(), torch.linspace(-1, 1, 4), []
    count = accumulation.count_cost
    monkeypatch.setattr(
        accumulation, "count_cost", lambda *args: replace(count(*args), pairwise=pairwise, keeps_gradients=keeps)
    )

    def product(left, right, out):
        given.append((left.dtype, right.dtype))
        result = (left.double() @ right.double()).float()
        return result if out is None else out.copy_(result)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            step = measure(GramEngine, model, PerSampleLoss(model), forget, retain)
            combination = step.combine(weighed(0.7, 0.0, dict.fromkeys(step.parameters.projected, weights)))
        gradients = torch.autograd.grad(combination, list(trainable(model).projected.values()), materialize_grads=True)
        return step.gram, torch.cat([gradient.flatten() for gradient in gradients])

    gram, update = run()
    monkeypatch.setattr(products, "sums_in_float32", lambda device, dtype: True)
    monkeypatch.setattr(products, "_multiply_halves", product)
    found, found_update = run()
    assert len(given) > 10 and set(given) == {(torch.bfloat16, torch.bfloat16)}
    assert relative_error(found, gram) <= 2e-6
    assert (found_update - update).norm() <= 1e-5 * update.norm()
