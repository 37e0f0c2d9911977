"""What real models do beside calling layers, and whether the recorder follows it."""

import pytest
import torch
from engines import forget_batch, retain_batch
from test_gradients import measure, relative_error
from torch import nn

from hf_orthograd.gradients import GramEngine, LoopEngine, UnsupportedModelError
from hf_orthograd.gradients.gram.recording import Recorder
from hf_orthograd.parallel import Parameters


class Odd(nn.Module):
    """What real models do beside calling layers: tied and transposed weights, bare parameters, writing in place."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(1, 7, 6))
        self.token = nn.Parameter(torch.randn(6))
        self.scale = nn.Parameter(torch.rand(6))
        self.table = nn.Parameter(torch.randn(13, 1))
        self.convolution = nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 6, 3, padding=1, groups=2))
        self.norm = nn.LayerNorm(6)
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, ids, labels=None):
        hidden = self.embedding(ids) + self.positions
        hidden[:, 2] = self.token
        bias = self.table[torch.arange(7)[:, None] - torch.arange(7) + 6].squeeze(-1)
        mixing = (hidden @ hidden.transpose(1, 2) + bias).softmax(-1)
        hidden = self.norm(mixing @ hidden) * self.scale
        hidden = self.convolution(hidden.transpose(1, 2)).transpose(1, 2)
        prefix = self.token.expand(len(ids), 1, -1)
        hidden = torch.cat((prefix, hidden), dim=1)
        return hidden @ self.embedding.weight.t()


def odd_losses(model, inputs):
    return model(inputs["ids"]).logsumexp(-1).square().mean(-1)


# as many samples as positions, features or rows of the vocabulary: sizes must not be mistaken for the batch
@pytest.mark.parametrize("size", [1, 4, 6, 7, 11])
def test_gram_follows_what_is_not_a_layer(size):
    torch.manual_seed(0)
    model = Odd()
    generator = torch.Generator().manual_seed(size)
    forget = {"ids": torch.randint(0, 11, (3, 7), generator=generator)}
    retain = {"ids": torch.randint(0, 11, (size, 7), generator=generator)}
    step = measure(GramEngine, model, odd_losses, forget, retain)
    reference = measure(LoopEngine, model, odd_losses, forget, retain)
    for name, gram in reference.grams.items():
        torch.testing.assert_close(step.grams[name], gram, rtol=1e-4, atol=1e-5 * gram.abs().max().item(), msg=name)


def test_kept_arguments_hang_on_a_tensor():
    """Up to torch 2.11 a node lets go of what it saved with the last tensor of its own, though Python still holds the node."""
    model, ids = Odd(), torch.arange(7)[None]
    with Recorder(dict(model.named_parameters())) as recorder:
        recorder.begin({"ids": ids})
        model(ids)
    kept = [call.holder for call in recorder.calls if hasattr(call, "holder")]
    assert len(kept) >= 4 and all(isinstance(holder, torch.Tensor) for holder in kept)


# a weight of 16 x 24 has 384 numbers, its factors 40 of each position: at 8 the gradients take 1.2 times as much memory
@pytest.mark.parametrize(("positions", "keeps_gradients"), [(7, False), (8, True), (10, True)])
def test_gradients_are_kept_where_factors_take_hardly_less(positions, keeps_gradients):
    torch.manual_seed(0)
    model = nn.Linear(24, 16)

    def losses(model, inputs):
        return model(inputs["x"]).square().mean(dim=(1, 2))

    forget, retain = ({"x": torch.randn(3, positions, 24)} for _ in range(2))
    step = measure(GramEngine, model, losses, forget, retain)
    assert step.kept["weight"].are_dense == keeps_gradients
    torch.testing.assert_close(step.gram, measure(LoopEngine, model, losses, forget, retain).gram, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 11)),
        (nn.Conv1d(4, 6, 3, dilation=2, bias=False), (4, 11)),
        (nn.Conv1d(4, 6, 3, padding="same"), (4, 11)),
        (nn.Conv1d(4, 6, 3, groups=2), (4, 11)),
        (nn.Conv2d(3, 5, (2, 3), stride=(2, 1), padding=(0, 1)), (3, 6, 7)),
        (nn.Conv2d(3, 5, 4, stride=4), (3, 8, 8)),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3)), (4, 11)),
        (nn.GroupNorm(2, 4), (4, 11)),
        (nn.Conv3d(2, 3, 2), (2, 3, 4, 4)),
    ],
    ids=str,
)
def test_convolutions_and_norms(layer, shape):
    torch.manual_seed(0)
    forget, retain = {"x": torch.randn(3, *shape)}, {"x": torch.randn(4, *shape)}

    def losses(model, inputs):
        return model(inputs["x"]).square().flatten(1).sum(-1)

    step = measure(GramEngine, layer, losses, forget, retain)
    reference = measure(LoopEngine, layer, losses, forget, retain)
    assert relative_error(step.gram, reference.gram) <= 1e-5
    for name, gram in reference.grams.items():
        torch.testing.assert_close(step.grams[name], gram, rtol=1e-4, atol=1e-5 * gram.abs().max().item(), msg=name)


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.layer.weight.requires_grad_(False)  # or autograd itself would refuse

    def forward(self, features):
        features = features.clone()
        result = self.layer(features)
        features.zero_()
        return result


def test_input_overwritten_after_the_call_is_refused():
    with pytest.raises(UnsupportedModelError, match="`linear`, which uses layer.bias.*overwritten in place.*'loop'"):
        model = Overwriting()
        losses = lambda model, inputs: model(inputs["x"]).sum(-1)  # noqa: E731
        measure(GramEngine, model, losses, {"x": torch.randn(2, 4)}, {"x": torch.randn(3, 4)})


class Attention(nn.Module):
    def __init__(self, batch_first, need_weights):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.probe = nn.Parameter(torch.randn(1, 3, 8))
        self.batch_first, self.need_weights = batch_first, need_weights

    def forward(self, x, other, padding):
        first = self._run(x, x, x, None)
        return first + self._run(first + self.probe.repeat(len(x), 1, 1)[:, :1], other, other, padding)

    def _run(self, query, key, value, padding):
        if not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        causal = nn.Transformer.generate_square_subsequent_mask(query.shape[1]) if query is key else None
        output, _ = self.attention(
            query, key, value, key_padding_mask=padding, need_weights=self.need_weights, attn_mask=causal
        )
        return output if self.batch_first else output.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multi_head_attention_is_followed_inside(batch_first, need_weights):
    torch.manual_seed(0)
    model = Attention(batch_first, need_weights)

    def data(count):
        padding = torch.arange(6).repeat(count, 1) > 2 + torch.arange(count)[:, None]
        return {"x": torch.randn(count, 5, 8), "other": torch.randn(count, 6, 8), "padding": padding}

    def losses(model, inputs):
        return model(**inputs).square().sum(dim=(1, 2))

    forget, retain = data(2), data(3)
    step = measure(GramEngine, model, losses, forget, retain)
    reference = measure(LoopEngine, model, losses, forget, retain)
    for name, gram in reference.grams.items():
        torch.testing.assert_close(step.grams[name], gram, rtol=1e-4, atol=1e-5 * gram.abs().max().item(), msg=name)


class Compiled(nn.Module):
    """What a model looks like that does not run through torch's Python functions: nothing is seen of it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        with torch._C.DisableTorchFunction():
            return x @ self.weight


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_step_that_records_nothing_raises(chunk_size):
    """Projection and retain term would vanish in silence."""
    model = Compiled()
    losses = lambda model, inputs: model(inputs["x"]).square().sum(-1)  # noqa: E731
    engine = GramEngine(Parameters(dict(model.named_parameters()), {}), losses, chunk_size=chunk_size)
    batches = [forget_batch({"x": torch.randn(2, 4)})], [retain_batch({"x": torch.randn(3, 4)})]
    with pytest.raises(UnsupportedModelError, match="No call of Compiled that uses a trained parameter was seen"):
        engine.measure(model, *batches)
