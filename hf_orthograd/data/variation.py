"""Retain samples varied anew each time they are read, so that a few of them are not learned by heart.

Each is a transform for [`datasets.Dataset.with_transform`]. A row is read once for a step: inner products, model and starting
model see the same variation. Draws come from torch's generator, which seeds and workers set. A resumed run draws other ones: Trainer
reads the first batches before it sets the generator back.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from transformers import SequenceFeatureExtractor


@dataclass
class VaryImages:
    """Flips images and shifts them.

    Args:
        flip (`bool`): Whether every second image is mirrored, left to right. Not for digits or letters.
        shift (`float`): Most that an image moves along each side, as a share of it; what is beyond the border is reflected.
        column (`str`): Of the images: arrays of shape (channels, height, width).
    """

    flip: bool = True
    shift: float = 0.125
    column: str = "pixel_values"

    def __post_init__(self):
        if not 0 <= self.shift <= 0.5:
            raise ValueError(f"`shift` must be in [0, 0.5], a share of the image's side, but is {self.shift}.")

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        return {**rows, self.column: [self.vary(image) for image in _column(rows, self.column)]}

    def vary(self, image: ArrayLike) -> torch.Tensor:
        image = torch.from_numpy(np.asarray(image, dtype=np.float32))
        height, width = image.shape[-2:]
        down, right = round(self.shift * height), round(self.shift * width)
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        padded = F.pad(image[None], (right, right, down, down), mode="reflect")[0]
        top, left = _draw(2 * down), _draw(2 * right)
        return padded[:, top : top + height, left : left + width]


@dataclass
class VarySpeech:
    """Shifts utterances in time and masks parts of them, as SpecAugment does (arXiv 1904.08779).

    Log-mel features get masks of time and of frequency, with their mean of 0; waveforms of time alone. Labels are those of the
    whole utterance, so masks are short.

    Args:
        extractor (`transformers.SequenceFeatureExtractor`): Of the model. It tells the column, and how long a frame is.
        shift (`float`): Most that an utterance moves, in seconds; what moves out is lost, so no longer than its silence.
        time_mask (`float`): Longest mask of time, in seconds.
        mel_mask (`int`): Widest mask of frequency, in mel bins.
        masks (`int`): How many of each.

    Raises:
        ValueError: A setting is negative; or, when rows are read, features (mel bins, frames) or (frames, mel bins) of which the
            extractor does not say which they are, or how long a frame is.
    """

    extractor: SequenceFeatureExtractor
    shift: float = 0.1
    time_mask: float = 0.2
    mel_mask: int = 10
    masks: int = 2

    def __post_init__(self):
        for name in ("shift", "time_mask", "mel_mask", "masks"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, but is {getattr(self, name)}.")

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        column = self.extractor.model_input_names[0]
        return {**rows, column: [self.vary(utterance) for utterance in _column(rows, column)]}

    def vary(self, utterance: ArrayLike) -> np.ndarray:
        varied = np.array(utterance, dtype=np.float32)
        is_mel = varied.ndim == 2  # else samples
        if is_mel and not self._bins_first(varied.shape):
            return np.ascontiguousarray(self.vary(varied.T).T)
        rate = self.extractor.sampling_rate / (self.extractor.hop_length if is_mel else 1)
        varied = _shifted(varied, _draw(2 * round(self.shift * rate)) - round(self.shift * rate))
        for _ in range(self.masks):
            varied[..., _span(varied.shape[-1], round(self.time_mask * rate))] = 0
            if is_mel:
                varied[_span(len(varied), self.mel_mask)] = 0
        return varied

    def _bins_first(self, shape: tuple[int, ...]) -> bool:
        """Whether features are (mel bins, frames), as Whisper's, or (frames, mel bins).

        Raises:
            ValueError: The extractor does not say which, or how long a frame is.
        """
        bins = self.extractor.feature_size
        if bins not in shape or shape[0] == shape[1] or getattr(self.extractor, "hop_length", None) is None:
            raise ValueError(
                f"`extractor` is a {type(self.extractor).__name__}, whose features have shape {shape}: it does not say by `feature_size` and "
                "`hop_length` which are mel bins, and how long a frame is. Vary waveforms before they are extracted, or leave it out."
            )
        return shape[0] == bins


def _column(rows: dict[str, list], name: str) -> list[Any]:
    if name not in rows:
        raise ValueError(f"There is no column {name!r} to vary, only {', '.join(rows)}: prepare the rows first.")
    return rows[name]


def _draw(most: int) -> int:
    """A whole number from 0 to `most`."""
    return int(torch.randint(0, most + 1, ()))


def _shifted(values: np.ndarray, frames: int) -> np.ndarray:
    """Moved along the last axis; silence comes in, the least value of features and 0 of a waveform."""
    moved = np.full_like(values, values.min() if values.ndim == 2 else 0)
    length = values.shape[-1] - abs(frames)
    if length > 0:
        moved[..., max(frames, 0) :][..., :length] = values[..., max(-frames, 0) :][..., :length]
    return moved


def _span(length: int, widest: int) -> slice:
    width = min(_draw(widest), length)
    start = _draw(length - width)
    return slice(start, start + width)
