import math

import pytest
import torch
import transformers
from torch.utils.data import default_collate

from hf_orthograd.objectives import (
    Ascent,
    NegativePreference,
    PerSampleLoss,
    SimpleNegativePreference,
)
from hf_orthograd.validation import check_per_sample
from hf_orthograd.validation.samples import find_unlabelled_rows


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2", "vit", "llama"])
def test_each_sample_has_the_loss_the_model_gives_it_alone(kind, make_model, make_samples):
    """Padding, masked labels and unequal lengths in a batch change no sample's loss."""
    model, samples = make_model(kind).eval(), make_samples(kind, 6)
    examples = [samples[index] for index in range(6)]
    with torch.no_grad():
        losses = PerSampleLoss(model)(model, default_collate(examples))
        alone = [model(**default_collate([example])).loss for example in examples]
    torch.testing.assert_close(losses, torch.stack(alone), rtol=1e-4, atol=1e-5)
    assert losses.std() > 1e-3


@pytest.mark.parametrize("kind", ["whisper", "vit", "llama"])
def test_a_decoder_computes_no_second_loss(kind, make_model, make_samples):
    """Over its vocabulary that takes as much memory as the logits; elsewhere labels may do more than that."""
    model, batch = make_model(kind), default_collate([make_samples(kind, 2)[index] for index in range(2)])
    losses = PerSampleLoss(model)
    assert (losses.outputs(model, batch).loss is None) is (kind == "llama")
    assert losses.outputs(model, batch, own_loss=True).loss is not None


def test_retain_mean_is_over_samples_not_tokens(make_model, make_samples):
    model, samples = make_model("llama").eval(), make_samples("llama", 4)
    batch = default_collate([samples[index] for index in range(4)])
    with torch.no_grad():
        losses = PerSampleLoss(model)(model, batch)
        token_mean = model(**batch).loss
    lengths = (batch["labels"][:, 1:] >= 0).sum(dim=1)
    assert lengths.unique().numel() > 1
    torch.testing.assert_close((losses * lengths).sum() / lengths.sum(), token_mean)
    assert abs(losses.mean() - token_mean) > 1e-4


def test_ctc_sum_reduction_is_the_total(make_model, make_samples):
    model, samples = make_model("wav2vec2").eval(), make_samples("wav2vec2", 3)
    model.config.ctc_loss_reduction = "sum"
    batch = default_collate([samples[index] for index in range(3)])
    with torch.no_grad():
        torch.testing.assert_close(PerSampleLoss(model)(model, batch).sum(), model(**batch).loss, rtol=1e-4, atol=0)


def test_unknown_model_asks_for_a_loss():
    with pytest.raises(
        ValueError, match=r"per-sample loss of Linear is not known. Pass `compute_loss_func.*auto class of its task"
    ):
        PerSampleLoss(torch.nn.Linear(2, 2))


def test_npo_by_hand():
    """Losses 2 and 1 against a reference of 1, beta 0.5: p / p_ref is 1/e and 1."""
    npo = NegativePreference(torch.tensor([1.0, 1.0]), beta=0.5)
    losses = torch.tensor([2.0, 1.0], requires_grad=True)
    minimised = [2 / 0.5 * math.log(1 + math.exp(-1) ** 0.5), 2 / 0.5 * math.log(2)]
    value = npo.value(losses)
    assert value.item() == pytest.approx(-sum(minimised) / 2)
    value.backward()
    expected = [2 * math.exp(-0.5) / (1 + math.exp(-0.5)), 1.0]
    torch.testing.assert_close(npo.slopes(losses.detach()), torch.tensor(expected))
    # the slopes are the gradient of the value: what is ascended is what is reported
    torch.testing.assert_close(losses.grad, torch.tensor(expected) / 2)


def test_simnpo_by_hand():
    """Mean token losses 2 and 1, beta 0.5, gamma 0.25; the sigmoid written out."""
    simnpo = SimpleNegativePreference(beta=0.5, gamma=0.25)
    losses = torch.tensor([2.0, 1.0], requires_grad=True)
    minimised = [-2 / 0.5 * math.log(1 / (1 + math.exp(-(0.5 * loss - 0.25)))) for loss in (2.0, 1.0)]
    value = simnpo.value(losses)
    assert value.item() == pytest.approx(-sum(minimised) / 2)
    value.backward()
    torch.testing.assert_close(simnpo.slopes(losses.detach()) / 2, losses.grad)
    assert simnpo.slopes(torch.tensor([100.0])) < 1e-9


def test_npo_is_bounded_and_ascent_is_not():
    losses = torch.tensor([0.0, 10.0, 1000.0])
    slopes = NegativePreference(torch.zeros(3), beta=1.0).slopes(losses)
    assert slopes[0] == 1
    assert slopes[1] < 1e-3
    assert slopes[2] == 0
    assert torch.equal(Ascent().slopes(losses), torch.ones(3))


def test_unlabelled_rows():
    labels = torch.tensor([[-100, -100, -100], [5, -100, -100], [1, 2, 3]])
    assert find_unlabelled_rows(labels, shifted=False) == [0]
    # a causal model never predicts the first position
    assert find_unlabelled_rows(labels, shifted=True) == [0, 1]
    assert find_unlabelled_rows(torch.tensor([0, 1]), shifted=False) == []


@pytest.mark.parametrize("losses", [torch.tensor(1.0), torch.ones(3, 2), 1.0])
def test_loss_that_is_not_per_sample_is_refused(losses):
    with pytest.raises(ValueError, match=r"one number for each sample, shape \(3,\)"):
        check_per_sample(losses, 3)


def test_ctc_of_models_that_count_frames_in_their_encoder():
    """Parakeet and LASR have no `_get_feat_extract_output_lengths`."""
    config = transformers.ParakeetCTCConfig(
        vocab_size=20, pad_token_id=0,
        encoder_config=transformers.ParakeetEncoderConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_mel_bins=16,
            subsampling_conv_channels=8, dropout=0.0, layerdrop=0.0, activation_dropout=0.0, attention_dropout=0.0,
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ParakeetForCTC(config).eval()
    features, mask = torch.randn(2, 80, 16), torch.ones(2, 80, dtype=torch.long)
    mask[1, 48:] = 0
    labels = torch.tensor(
        [[3, 4, 5], [6, 7, 8]]
    )  # transformers 5.17 masks padded labels here by another number than -100
    inputs = {"input_features": features, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        found = PerSampleLoss(model)(model, inputs)
        alone = [model(**{name: value[i : i + 1] for name, value in inputs.items()}).loss for i in range(2)]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-3, atol=1e-3)
