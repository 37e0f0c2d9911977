"""Retain samples varied anew at each read: what changes, what stays, and that one step reads one variation."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from hf_orthograd.data import VaryImages, VarySpeech


IMAGE = np.arange(3 * 8 * 8, dtype=np.float32).reshape(3, 8, 8)


def test_image_moves_by_whole_pixels_with_reflected_borders():
    seen = set()
    padded = np.pad(IMAGE, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    windows = [
        padded[:, top : top + 8, left : left + 8][..., ::step]
        for top in range(3)
        for left in range(3)
        for step in (1, -1)
    ]
    torch.manual_seed(0)
    for _ in range(300):
        varied = VaryImages()({"pixel_values": [IMAGE.tolist()], "labels": [1]})
        assert varied["labels"] == [1]
        seen.add([np.array_equal(varied["pixel_values"][0], window) for window in windows].index(True))
    assert len(seen) == len(windows)


def test_image_stays_without_flip_and_shift():
    assert torch.equal(VaryImages(flip=False, shift=0).vary(IMAGE), torch.from_numpy(IMAGE))


def test_features_are_shifted_and_masked():
    vary = VarySpeech(WhisperFeatureExtractor(feature_size=80, chunk_length=4), shift=0.1, time_mask=0.2, mel_mask=10)
    features = np.random.default_rng(0).uniform(0.5, 1.5, (80, 400)).astype(np.float32)
    torch.manual_seed(0)
    for _ in range(50):
        varied = vary.vary(features)
        assert varied.shape == features.shape and varied.dtype == np.float32
        masked = varied == 0
        frames, mels = masked.all(0).sum(), masked.all(1).sum()
        assert frames <= 2 * 20 and mels <= 2 * 10
        kept = ~masked.all(0)[None] & ~masked.all(1)[:, None]
        moved = [
            shift for shift in range(-10, 11) if np.mean((np.roll(features, shift, -1) == varied)[kept]) > 0.95
        ]  # the frames that moved in are silent
        assert len(moved) == 1


def test_features_may_have_their_frames_first(parakeet_extractor):
    features = np.random.default_rng(0).uniform(0.5, 1.5, (80, 300)).astype(np.float32)
    found = []
    for extractor, own in ((WhisperFeatureExtractor(), features), (parakeet_extractor, features.T)):
        torch.manual_seed(0)
        found.append(VarySpeech(extractor).vary(own))
    assert np.array_equal(found[0], found[1].T) and found[1].flags.c_contiguous
    with pytest.raises(
        ValueError, match="`extractor` is a SeamlessM4TFeatureExtractor, whose features have shape .* does not say"
    ):
        VarySpeech(SeamlessM4TFeatureExtractor()).vary(np.ones((50, 160)))
    with pytest.raises(ValueError, match="features have shape .80, 80.: it does not say"):
        VarySpeech(parakeet_extractor).vary(np.ones((80, 80)))


def test_waveform_is_shifted_and_silenced():
    vary = VarySpeech(Wav2Vec2FeatureExtractor(), shift=0.1, time_mask=0.2, masks=1)
    samples = np.random.default_rng(0).uniform(0.5, 1.5, 32000)
    torch.manual_seed(0)
    silent = [int((vary.vary(samples.tolist()) == 0).sum()) for _ in range(50)]
    assert min(silent) < 1600 < max(silent) <= 1600 + 3200  # at most a tenth of a second moved in, two tenths masked


@pytest.mark.parametrize("utterance", [np.ones(5, np.float32), np.ones((80, 3), np.float32)])
def test_utterance_shorter_than_shift_and_masks(utterance):
    extractor = WhisperFeatureExtractor() if utterance.ndim == 2 else Wav2Vec2FeatureExtractor()
    vary = VarySpeech(extractor, shift=1.0, time_mask=1.0, mel_mask=200)
    for _ in range(50):
        assert vary.vary(utterance).shape == utterance.shape


def test_rows_vary_at_each_read_and_repeat_with_the_seed():
    rows = Dataset.from_dict({"pixel_values": [IMAGE.tolist()] * 2, "labels": [0, 1], "id": ["a", "b"]})
    varied = rows.with_transform(VaryImages())
    torch.manual_seed(0)
    first, second = (varied[0]["pixel_values"] for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(varied[0]["pixel_values"], first) and not torch.equal(first, second)
    assert varied[0]["id"] == "a"


def test_bad_settings_and_columns_are_named():
    with pytest.raises(ValueError, match=r"`shift` must be in \[0, 0.5\], a share of the image's side, but is 4"):
        VaryImages(shift=4)
    with pytest.raises(ValueError, match="`mel_mask` must not be negative, but is -1"):
        VarySpeech(WhisperFeatureExtractor(), mel_mask=-1)
    with pytest.raises(ValueError, match="no column 'pixel_values' to vary, only image: prepare"):
        VaryImages()({"image": [IMAGE]})
