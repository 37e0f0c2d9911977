"""Makes a classifier of images or videos forget a class, or random ones, and reports whether it did.

With no arguments: a small ViT is trained on scikit-learn's handwritten digits and forgets the threes, without network.

    accelerate launch examples/unlearn_image.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name path/or/hub-id --forget_values cat --retain_size 500 --finetune_epochs 3 --output_dir out

Random images: `--forget_fraction 0.05` in place of `--forget_values`. Videos: `--video`, whose default is a VideoMAE that learns
how digits move, and forgets those that move to the left.
"""

import copy
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import transformers
from accelerate import PartialState
from datasets import (
    Array3D,
    Array4D,
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    concatenate_datasets,
    load_dataset,
)
from demo_videos import make_video_model, make_videos
from shared import (
    NO_DEMO,
    WITHOUT_RULE,
    ComparisonArguments,
    compared_models,
    relearning,
    say_that_nothing_stops,
    trained_folder,
    watched_sets,
    where_it_is,
)
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    HfArgumentParser,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer, split_forget_retain
from hf_orthograd.callbacks import show_one_bar
from hf_orthograd.data import VaryImages, check_corpus
from hf_orthograd.evaluation import Quantization, evaluate_unlearning
from hf_orthograd.publishing import check_access


@dataclass
class ScriptArguments(ComparisonArguments):
    """What to forget, in which model; see [`OrthoGradConfig`] for how."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder; a small ViT by default."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder with splits train and test; handwritten digits by default."}
    )
    image_column: str = field(default="image", metadata={"help": "Column with the images, or lists of frames."})
    video: bool = field(default=False, metadata={"help": "Whether rows are videos, as lists of frames."})
    label_column: str = field(default="label", metadata={"help": "Column with the classes."})
    forget_values: list[str] = field(default_factory=list, metadata={"help": "Classes to forget, by name."})
    forget_fraction: float = field(default=0.0, metadata={"help": "Or the share of random training images to forget."})
    retain_size: float | None = field(
        default=None, metadata={"help": "Other training images still at hand: a number, or a fraction below 1."}
    )
    finetune_learning_rate: float = field(default=1e-3, metadata={"help": "Its learning rate."})
    finetune_batch_size: int = field(default=64, metadata={"help": "Its batch size per device."})
    stop_in_time: bool = field(
        default=True,
        metadata={
            "help": "Without `--forget_target`, stop where `--stop_metric` of the forgotten is that of the retrained model, "
            "or without one, for random images, that of test images before unlearning."
        },
    )
    vary_retain: bool | None = field(
        default=None,
        metadata={
            "help": "Flip and shift retain images anew at each step; by default with retain_loss='kl', of no video."
        },
    )
    flip: bool = field(default=True, metadata={"help": "Whether a mirrored image is one of its class."})
    relearning_steps: int = field(default=20, metadata={"help": "Steps of the relearning attack; 0 for none."})
    relearning_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Its learning rate; by default a tenth of that of fine-tuning, if there was any, else that of unlearning."
        },
    )


DEMO = {
    "forget_values": ["3"],
    "retain_size": 120,
    "finetune_epochs": 40,
    "retrain": True,
    "output_dir": "out/digits",
    "alpha": 0.5,
    "max_steps": 60,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 60,
    "per_device_forget_batch_size": 32,
    "flip": False,
    "stop_metric": "accuracy",
    "stop_greater_is_better": True,
    "logging_steps": 2,
}

VIDEO_DEMO = DEMO | {"forget_values": ["left"], "finetune_epochs": 15, "output_dir": "out/videos"}


def build_demo() -> tuple[ViTForImageClassification, ViTImageProcessor, DatasetDict]:
    """A ViT of 0.1 M parameters and the 1797 digits of 8 x 8 pixels that come with scikit-learn."""
    digits = load_digits()
    images = np.repeat((digits.images * 255 / 16).astype(np.uint8)[..., None], 3, axis=3)
    names = [str(number) for number in range(10)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    parts = train_test_split(np.arange(len(images)), test_size=0.3, random_state=0, stratify=digits.target)
    corpus = {
        split: Dataset.from_dict({"image": list(images[rows]), "label": digits.target[rows]}, features=features)
        for split, rows in zip(("train", "test"), parts, strict=True)
    }
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=8,
        patch_size=2,
        num_labels=10,
        id2label=dict(enumerate(names)),
    )
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    return ViTForImageClassification(config), processor, DatasetDict(corpus)


def load(arguments: ScriptArguments):
    """Returns the model, its processor, and the images with splits train and test."""
    if arguments.model_name_or_path is None and arguments.video:
        return *make_video_model(), make_videos({"train": 1200, "test": 480})
    if arguments.model_name_or_path is None:
        return build_demo()
    corpus = load_dataset(arguments.dataset_name)
    check_corpus(corpus, {"--image_column": arguments.image_column, "--label_column": arguments.label_column})
    classes = corpus["train"].features[arguments.label_column]
    if not isinstance(classes, ClassLabel):
        raise ValueError(
            f"`--label_column` is {arguments.label_column!r}, which holds {classes}, but must name classes: prepare it with "
            f"`dataset.class_encode_column({arguments.label_column!r})`."
        )
    names = classes.names
    config = AutoConfig.from_pretrained(arguments.model_name_or_path, num_labels=len(names))
    config.id2label, config.label2id = dict(enumerate(names)), {name: number for number, name in enumerate(names)}
    # a head for other classes is replaced by a new one, which transformers says
    model_class = AutoModelForVideoClassification if arguments.video else AutoModelForImageClassification
    model = model_class.from_pretrained(
        arguments.model_name_or_path, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
    )
    return model, AutoImageProcessor.from_pretrained(arguments.model_name_or_path), corpus


def prepare(corpus: DatasetDict, processor, arguments: ScriptArguments) -> DatasetDict:
    """Images, or the frames of videos, become `pixel_values`, classes `labels`."""

    def process(rows: dict) -> dict:
        return {"pixel_values": pixels_of(rows[arguments.image_column]), "labels": rows[arguments.label_column]}

    def pixels_of(images: list) -> np.ndarray:
        coloured = [
            [frame.convert("RGB") for frame in image] if arguments.video else image.convert("RGB") for image in images
        ]
        return processor(coloured, return_tensors="np")["pixel_values"]

    rows = corpus["train"]
    shape = pixels_of([rows[0][arguments.image_column]]).shape[1:]
    array = Array4D if arguments.video else Array3D
    features = Features({"pixel_values": array(shape, "float32"), "labels": rows.features[arguments.label_column]})
    return corpus.map(process, batched=True, batch_size=100, remove_columns=rows.column_names, features=features)


def split(images: DatasetDict, names: list[str], arguments: ScriptArguments, seed: int) -> dict[str, Dataset]:
    """Training images to forget, still at hand and lost; test images of other classes and of the forgotten ones."""
    if bool(arguments.forget_values) == bool(arguments.forget_fraction):
        raise ValueError(
            f"Pass one of `--forget_values` and `--forget_fraction`, but they are {arguments.forget_values} and "
            f"{arguments.forget_fraction}."
        )
    train, test = images["train"], images["test"]
    if arguments.forget_fraction:
        drawn = np.random.default_rng(seed).permutation(len(train))[: round(arguments.forget_fraction * len(train))]
        chosen = np.isin(np.arange(len(train)), drawn)
        train, column, values = train.add_column("chosen", chosen.tolist()), "chosen", True
    else:
        unknown = [name for name in arguments.forget_values if name not in names]
        if unknown:
            raise ValueError(f"`--forget_values` {unknown} are no classes of the data set, which has {names}.")
        column, values = "labels", [names.index(name) for name in arguments.forget_values]
    everyone = split_forget_retain(train, column, values)
    at_hand = split_forget_retain(train, column, values, retain_size=arguments.retain_size, seed=seed)
    sets = {"forget": everyone["forget"], "retain": at_hand["retain"], "others": everyone["retain"], "test": test}
    if column == "labels":
        unseen = split_forget_retain(test, column, values)
        sets |= {"test": unseen["retain"], "forget_unseen": unseen["forget"]}
    return {name: rows.select_columns(["pixel_values", "labels"]).with_format("numpy") for name, rows in sets.items()}


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def finetune(model, sets: dict[str, Dataset], args: OrthoGradConfig, arguments: ScriptArguments, processor):
    """A copy of the model, trained on these sets by the plain Trainer, and saved."""
    model = copy.deepcopy(model)
    args = replace(
        args,
        **WITHOUT_RULE,
        output_dir=trained_folder(args.output_dir, list(sets)),
        max_steps=-1,
        num_train_epochs=arguments.finetune_epochs,
        learning_rate=arguments.finetune_learning_rate,
        per_device_train_batch_size=arguments.finetune_batch_size,
        warmup_steps=0.1,
        logging_steps=200,
    )
    transformers.set_seed(args.seed)
    images = concatenate_datasets(list(sets.values()))
    trainer = show_one_bar(OrthoGradTrainer(model, args, train_dataset=images, processing_class=processor))
    trainer.train()
    trainer.save_model()
    return model


def stopping_in_time(args: OrthoGradConfig, reference, sets: dict, arguments: ScriptArguments) -> OrthoGradConfig:
    """The arguments with a rule that stops where a model would be that never saw the forget set, if one is known."""
    if not arguments.stop_in_time or args.forget_target is not None:
        return args
    level = "reference"
    if reference is not None:
        probe = OrthoGradTrainer(reference, replace(args, **WITHOUT_RULE), compute_metrics=accuracy)
        level = probe.evaluate(sets["forget"])[f"eval_{args.stop_metric}"]
    elif "forget_unseen" in sets:  # of a class that the model knows, unseen images are recognised like the others
        say_that_nothing_stops()
        return args
    when = {"eval_strategy": "steps", "eval_steps": args.eval_steps or 2} if args.eval_strategy == "no" else {}
    return replace(args, forget_target=level, **when)


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, OrthoGradConfig))
    if not any(argument.startswith(NO_DEMO) for argument in sys.argv):
        parser.set_defaults(**(VIDEO_DEMO if "--video" in sys.argv else DEMO))
        if any(argument.startswith("--forget_fraction") for argument in sys.argv):
            # random images are forgotten when they are recognised no better than test images
            parser.set_defaults(forget_values=[], stop_metric="loss", stop_greater_is_better=False)
    parser.set_defaults(hub_strategy="end")  # nothing is pushed while unlearning runs
    arguments, args = parser.parse_args_into_dataclasses()
    if (arguments.model_name_or_path is None) != (arguments.dataset_name is None):
        raise ValueError("Pass both `--model_name_or_path` and `--dataset_name`, or neither for the demo.")
    if arguments.video and arguments.vary_retain:
        raise ValueError("`--vary_retain` is set with `--video`, but frames are not varied. Leave it out.")
    arguments.check(args, arguments.model_name_or_path)
    check_access(args)  # before training: the trainer that unlearns is made hours later
    transformers.set_seed(args.seed)
    start, processor, corpus = load(arguments)
    names = [start.config.id2label[number] for number in range(start.config.num_labels)]
    sets = split(prepare(corpus, processor, arguments), names, arguments, args.seed)

    measured = {name: rows for name, rows in sets.items() if name != "others"}
    retain = sets["retain"]
    if arguments.vary_retain or (arguments.vary_retain is None and args.retain_loss == "kl" and not arguments.video):
        retain = retain.with_transform(VaryImages(flip=arguments.flip))

    def unlearner(model, args: OrthoGradConfig) -> OrthoGradTrainer:
        return OrthoGradTrainer(
            copy.deepcopy(model),
            args,
            train_dataset=retain,
            forget_dataset=sets["forget"],
            eval_dataset=watched_sets(measured, args, sets["test"]),
            processing_class=processor,
            compute_metrics=accuracy,
        )

    if arguments.dry_run:
        PartialState().print(unlearner(start, args).estimate())
        return

    def train(names: list[str]):
        return finetune(start, {name: sets[name] for name in names}, args, arguments, processor)

    original, reference = compared_models(start, arguments, train)
    if not arguments.evaluate_only:
        args = stopping_in_time(args, reference, sets, arguments)
    trainer = unlearner(start if arguments.evaluate_only else original, args)
    if not arguments.evaluate_only:
        show_one_bar(trainer).train()
        trainer.save_model()
    measure(trainer, original, reference, measured, arguments)


def measure(trainer: OrthoGradTrainer, original, reference, sets: dict, arguments: ScriptArguments) -> None:
    """Writes the report, and publishes where that is asked for."""
    args = trainer.args
    attacks = [Quantization(8), Quantization(4, group_size=64)]
    if arguments.relearning_steps > 0:
        steps = sorted({1, arguments.relearning_steps // 4, arguments.relearning_steps} - {0})
        known = sets.get("forget_unseen")  # of a class; there are none of random images
        attacks.append(relearning(trainer, sets["forget"], arguments, steps=steps, batch_size=32, known=known))
    report = evaluate_unlearning(trainer, reference, attacks, original=original, datasets=sets, group_column="labels")
    if trainer.is_world_process_zero():
        report.save(args.output_dir)
        print(f"{report.to_markdown()}\n\n{where_it_is(args.output_dir, report, arguments)}")
    if not arguments.evaluate_only:
        publish = trainer.push_to_hub if args.push_to_hub else trainer.create_model_card
        publish(report=report)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
