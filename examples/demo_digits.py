"""Scikit-learn's handwritten digits with captions, and a small captioner, for machines without data."""

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, Value
from demo_people import byte_level_tokenizer
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor


NUMBERS = "zero one two three four five six seven eight nine".split()


def make_captions() -> DatasetDict:
    """The 1797 digits of 8 x 8 pixels that come with scikit-learn, each with a caption."""
    digits = load_digits()
    images = np.repeat((digits.images * 255 / 16).astype(np.uint8)[..., None], 3, axis=3)
    features = Features({"image": Image(), "caption": Value("string"), "digit": Value("string")})
    corpus = {}
    parts = train_test_split(np.arange(len(images)), test_size=0.3, random_state=0, stratify=digits.target)
    for split, rows in zip(("train", "test"), parts, strict=True):
        names = [NUMBERS[digit] for digit in digits.target[rows]]
        captions = [f"a handwritten {name}" for name in names]
        columns = {"image": list(images[rows]), "caption": captions, "digit": names}
        corpus[split] = Dataset.from_dict(columns, features=features)
    return DatasetDict(corpus)


def make_captioner(captions: DatasetDict) -> tuple[GitForCausalLM, GitProcessor]:
    """A GIT of 0.2 M parameters, with random weights."""
    tokenizer = byte_level_tokenizer(list(captions["train"]["caption"]), special=["<|start|>"])
    tokenizer.bos_token = "<|start|>"
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    size = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    config = GitConfig(
        vision_config={**size, "image_size": 8, "patch_size": 2},
        **size,
        vocab_size=len(tokenizer),
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GitForCausalLM(config), GitProcessor(images, tokenizer)
