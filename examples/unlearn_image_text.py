"""Makes a model that captions images forget a kind of them, and reports whether it did.

With no arguments: a small GIT learns to caption handwritten digits and forgets the threes, without network.

    accelerate launch examples/unlearn_image_text.py --model_name_or_path microsoft/git-base \
        --dataset_name path/or/hub-id --caption_column text --forget_column category --forget_values cat \
        --retain_size 500 --finetune_epochs 3 --output_dir out

Captioners are taken that read an image and a text alone, as GIT.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Array3D, Dataset, DatasetDict, Features, Sequence, Value
from demo_digits import make_captioner, make_captions
from shared import load_corpus
from transformers import AutoModelForImageTextToText, AutoProcessor, DataCollatorForSeq2Seq
from unlearn_text import DEMO as TEXT_DEMO
from unlearn_text import RunArguments, exact_answers, parse, run, split

from hf_orthograd.data import VaryImages
from hf_orthograd.evaluation.text import answer_scores
from hf_orthograd.objectives import IGNORED_LABEL


@dataclass
class ScriptArguments(RunArguments):
    """And where images and captions are."""

    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    caption_column: str = field(default="caption", metadata={"help": "Column with their captions."})
    flip: bool = field(default=True, metadata={"help": "Whether a mirrored image has the same caption."})


DEMO = {name: value for name, value in TEXT_DEMO.items() if not name.endswith("_column")} | {
    "forget_column": "digit",
    "forget_values": ["three"],
    "test_is_reworded": False,
    "retain_size": 180,
    "learning_rate": 2e-4,
    "flip": False,
    "output_dir": "out/captions",
    "per_device_train_batch_size": 60,
    "per_device_forget_batch_size": 32,
    "finetune_batch_size": 28,
}


def load(arguments: ScriptArguments):
    """Returns the model, its processor, and the images with splits train and test, and forget if it is one of its own."""
    if arguments.model_name_or_path is None:
        corpus = make_captions()
        return *make_captioner(corpus), corpus
    columns = {"--image_column": arguments.image_column, "--caption_column": arguments.caption_column}
    corpus = load_corpus(arguments.dataset_name, columns, arguments)
    model = AutoModelForImageTextToText.from_pretrained(arguments.model_name_or_path, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(arguments.model_name_or_path), corpus


def prepare(rows: Dataset, processor, arguments: ScriptArguments) -> Dataset:
    """Images become `pixel_values`, captions tokens from a first one, which is given, to a last one, which is learned."""
    tokenizer = processor.tokenizer
    first = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
    last = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id

    def process(batch: dict) -> dict:
        images = [image.convert("RGB") for image in batch[arguments.image_column]]
        captions = tokenizer(list(batch[arguments.caption_column]), add_special_tokens=False).input_ids
        return {
            "pixel_values": processor.image_processor(images, return_tensors="np")["pixel_values"],
            "input_ids": [[first, *caption, last] for caption in captions],
            "attention_mask": [[1] * (len(caption) + 2) for caption in captions],
            "labels": [[IGNORED_LABEL, *caption, last] for caption in captions],
        }

    shape = process(rows[:1])["pixel_values"].shape[1:]
    removed = [arguments.image_column, arguments.caption_column]
    kept = {name: feature for name, feature in rows.features.items() if name not in removed}
    tokens = dict.fromkeys(("input_ids", "attention_mask", "labels"), Sequence(Value("int64")))
    features = Features({**kept, "pixel_values": Array3D(shape, "float32"), **tokens})
    rows = rows.map(process, batched=True, batch_size=100, remove_columns=removed, features=features)
    return rows.with_format("numpy")


def collator(tokenizer):
    """Pads captions and stacks images."""
    pad = DataCollatorForSeq2Seq(tokenizer)

    def collate(rows: list[dict]) -> dict:
        images = [torch.as_tensor(np.asarray(row["pixel_values"])) for row in rows]
        texts = [{name: value for name, value in row.items() if name != "pixel_values"} for row in rows]
        return {**pad(texts), "pixel_values": torch.stack(images)}

    return collate


def main() -> None:
    arguments, args = parse(ScriptArguments, DEMO)
    model, processor, corpus = load(arguments)
    corpus = DatasetDict({name: prepare(rows, processor, arguments) for name, rows in corpus.items()})
    shared = {
        "data_collator": collator(processor.tokenizer),
        "processing_class": processor,
        "compute_metrics": exact_answers,
        "preprocess_logits_for_metrics": answer_scores,
    }
    vary = VaryImages(flip=arguments.flip) if args.retain_loss == "kl" else None
    run(model, split(corpus, arguments, args.seed), arguments, args, shared, vary)


if __name__ == "__main__":
    main()
