"""Images, models and sets of the image study: a small ViT on 12 000 images of CIFAR-10."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from datasets import load_dataset
from harness import trained_model
from torch.utils.data import Dataset
from transformers import ViTConfig, ViTForImageClassification

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer


NUM_CLASSES = 10
EPOCHS = 16
FURTHER_EPOCHS = 8  # of a trained model that is fine-tuned on a few more images


class Images(Dataset):
    """Rows of an array of images, float32 in [-1, 1], shape (3, 32, 32), with their labels."""

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor, rows: np.ndarray | None = None):
        rows = np.arange(len(labels)) if rows is None else rows
        self.pixels, self.labels, self.rows = pixels, labels, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        return {"pixel_values": self.pixels[row], "labels": self.labels[row]}

    def select(self, rows: np.ndarray) -> "Images":
        return Images(self.pixels, self.labels, self.rows[rows])

    def classes(self) -> np.ndarray:
        return self.labels.numpy()[self.rows]


class VariedImages(Images):
    """Images flipped and shifted by up to 4 pixels, anew each time that one is read."""

    SHIFT = 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        pixels = row["pixel_values"].flip(-1) if torch.rand(()) < 0.5 else row["pixel_values"]
        padded = F.pad(pixels[None], 4 * (self.SHIFT,), mode="reflect")[0]
        top, left = torch.randint(0, 2 * self.SHIFT + 1, (2,)).tolist()
        height, width = pixels.shape[-2:]
        return row | {"pixel_values": padded[:, top : top + height, left : left + width]}


@dataclass(frozen=True)
class Request:
    """What is to be forgotten: "random", 5 % of the images, or "class", all of one class; both drawn by the seed."""

    kind: str
    seed: int

    @property
    def forgotten_class(self) -> int:
        return (3 * self.seed + 1) % NUM_CLASSES

    def __str__(self) -> str:
        return f"{self.kind}-{self.seed}"


def load_images(folder: Path) -> tuple[Images, Images]:
    """Training and test images."""
    both = []
    for split in load_dataset(str(folder)).values():
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in split["image"]])
        pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        both.append(Images(pixels, torch.tensor(split["label"])))
    return both[0], both[1]


def split(request: Request, train: Images, test: Images, retain: str) -> dict[str, Images]:
    """The sets of a run.

    Args:
        retain (`str`): What is still at hand: a share of the retained training images, as "0.05", or "proxy", 475
            images of the same kind that were never trained on.

    Returns:
        "forget", "others" (all retained training images), "retain" (those at hand), "retain_measured" (1000 that are not
        at hand unless all are), "at_hand_measured", and from the test images, disjoint, "validation", "test" and "proxy";
        for a class also "forget_unseen" and "validation_unseen", test images of it.
    """
    generator = np.random.default_rng(request.seed)
    if request.kind == "class":
        forgotten = train.classes() == request.forgotten_class
    else:
        forgotten = np.zeros(len(train), dtype=bool)
        forgotten[generator.permutation(len(train))[: len(train) // 20]] = True
    order = generator.permutation(np.flatnonzero(~forgotten))
    # by row number, every second image is for the test; of the rest one half is for choosing settings
    test_rows = np.arange(len(test))
    parts = {"test": test_rows % 2 == 0, "validation": test_rows % 4 == 1, "proxy": test_rows % 4 == 3}
    sets = {name: np.flatnonzero(chosen) for name, chosen in parts.items()}
    if request.kind == "class":
        classes = test.classes()
        gone = {name: rows[classes[rows] == request.forgotten_class] for name, rows in sets.items()}
        sets = {name: rows[classes[rows] != request.forgotten_class] for name, rows in sets.items()}
        sets |= {"forget_unseen": gone["test"], "validation_unseen": gone["validation"]}
    images = {name: test.select(rows) for name, rows in sets.items()}
    size = len(order) if retain == "proxy" else round(float(retain) * len(order))
    at_hand = images["proxy"] if retain == "proxy" else train.select(order[:size])
    images |= {"forget": train.select(np.flatnonzero(forgotten)), "others": train.select(order), "retain": at_hand}
    return images | {
        "retain_measured": train.select(order[-1000:]),
        "at_hand_measured": at_hand.select(np.arange(len(at_hand))[:500]),
    }


def build_model() -> ViTForImageClassification:
    """A ViT of 0.56 M parameters with patches of 8 x 8."""
    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=32,
        patch_size=8,
        num_labels=NUM_CLASSES,
        hidden_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def train_on(images: Images, seed: int, output: Path, name: str) -> ViTForImageClassification:
    """The model trained on these images, from the disk if it has been trained before."""

    def train(model):
        learn(model, images, seed, output)

    return trained_model(output / name, lambda: untrained(seed), train, ViTForImageClassification.from_pretrained)


def untrained(seed: int) -> ViTForImageClassification:
    transformers.set_seed(seed)
    return build_model()


def learn(model: ViTForImageClassification, images: Images, seed: int, output: Path) -> int:
    """Trains the model, and returns in how many steps."""
    return _train(model, images, seed, output, num_train_epochs=EPOCHS, learning_rate=1e-3, warmup_steps=0.1)


def fine_tune(model: ViTForImageClassification, images: Dataset, seed: int, output: Path, name: str):
    """A trained model, trained further on these images, from the disk if it has been before."""

    def train(model):
        _train(model, images, seed, output, num_train_epochs=FURTHER_EPOCHS, learning_rate=3e-4)

    return trained_model(output / name, lambda: model, train, ViTForImageClassification.from_pretrained)


def _train(model: ViTForImageClassification, images: Dataset, seed: int, output: Path, **settings) -> int:
    args = OrthoGradConfig(
        output_dir=str(output / "training"),
        per_device_train_batch_size=128,
        weight_decay=0.05,
        lr_scheduler_type="cosine",
        logging_steps=200,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        **settings,
    )
    return OrthoGradTrainer(model, args, train_dataset=images).train().global_step
