"""Scikit-learn's handwritten digits on the move, and a small VideoMAE, for machines without data."""

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Sequence
from sklearn.datasets import load_digits
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEImageProcessor


FRAMES, SIDE, STEP = 4, 16, 2
# pixels down and right from one frame to the next, in steps
MOVEMENTS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1), "rising": (-1, 1), "falling": (1, -1)}


def make_videos(counts: dict[str, int], seed: int = 0) -> DatasetDict:
    """Four frames of 16 x 16 pixels each, of a digit that moves; the class is the movement, not the digit."""
    digits = (load_digits().images * 255 / 16).astype(np.uint8)
    generator = np.random.default_rng(seed)
    features = Features({"image": Sequence(Image()), "label": ClassLabel(names=list(MOVEMENTS))})
    corpus = {}
    for split, count in counts.items():
        labels = [number % len(MOVEMENTS) for number in range(count)]
        videos = [_video(digits[generator.integers(len(digits))], label, generator) for label in labels]
        corpus[split] = Dataset.from_dict({"image": videos, "label": labels}, features=features)
    return DatasetDict(corpus)


def _video(digit: np.ndarray, label: int, generator: np.random.Generator) -> list[np.ndarray]:
    frames = generator.integers(0, 40, (FRAMES, SIDE, SIDE), dtype=np.uint8)
    movement, room = np.array(list(MOVEMENTS.values())[label]), SIDE - len(digit)
    # so that it stays within the frame, wherever it goes
    way = movement * STEP * (FRAMES - 1)
    start = [generator.integers(max(0, -d), room - max(0, d) + 1) for d in way]
    for number, frame in enumerate(frames):
        top, left = start + number * STEP * movement
        region = frame[top : top + len(digit), left : left + len(digit)]
        region[:] = np.maximum(region, digit)
    return list(np.repeat(frames[..., None], 3, axis=3))


def make_video_model() -> tuple[VideoMAEForVideoClassification, VideoMAEImageProcessor]:
    """A VideoMAE of 0.1 M parameters, with random weights."""
    config = VideoMAEConfig(
        image_size=SIDE,
        patch_size=4,
        num_frames=FRAMES,
        tubelet_size=2,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=len(MOVEMENTS),
        id2label=dict(enumerate(MOVEMENTS)),
    )
    processor = VideoMAEImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return VideoMAEForVideoClassification(config), processor
