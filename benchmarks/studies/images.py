"""Which method makes a small ViT forget random images, or a class, as if it had never seen them?

    python benchmarks/studies/images.py --data_folder <CIFAR-10 as parquet>

Resumable: trained models lie in `--work_folder`, finished runs in the JSON file of the results. Every method has the same steps,
batches, stopping rule and four settings to choose from, chosen on validation images at 5 % retain data with the first seed.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import RESULTS, Records
from image_data import Images, Request, load_images, split, train_on
from methods import Bench, attacks_of
from study import Study, main
from transformers import ViTForImageClassification

from hf_orthograd.evaluation import Accuracy


MEASURED = {
    "forget": "forget",
    "retain": "retain_measured",
    "at_hand": "at_hand_measured",
    "test": "test",
    "validation": "validation",
    "forget_unseen": "forget_unseen",
}


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class ImageStudy(Study):
    name, kinds = "images", ("random", "class")
    grid = (3e-5, 1e-4, 3e-4, 1e-3)
    sized = ("graddiff", "npo", "mean_projection", "scrub", "orthograd", "orthograd_update", "orthograd_npo")
    sizes = ("0.01", "0.2", "1", "proxy")

    def __init__(self, data_folder: Path, work_folder: Path, records: Records, references: Records | None = None):
        super().__init__(records, references)
        self.train, self.test = load_images(data_folder)
        self.work = work_folder

    def request(self, kind: str, seed: int) -> Request:
        return Request(kind, seed)

    def bench(self, kind: str) -> Bench:
        """Random images are forgotten when their loss is that of unseen ones, a class when it is recognised no more."""
        rule = {"eval_strategy": "steps", "eval_steps": 2}
        if kind == "random":
            rule |= {"forget_target": "reference"}
        else:
            rule |= {"forget_target": "0.01", "stop_metric": "accuracy", "stop_greater_is_better": True}
        sizes = {"per_device_train_batch_size": 64, "per_device_forget_batch_size": 32}
        return Bench(
            config={
                "output_dir": str(self.work / "run"),
                "max_steps": 48,
                "per_device_eval_batch_size": 250,
                **sizes,
                **rule,
            },
            rule=tuple(rule),
            shared={"compute_metrics": accuracy},
            metric=Accuracy(),
            measured=MEASURED,
            evaluated={"reference": "validation"},
        )

    def sets(self, request: Request, retain: str) -> dict[str, Images]:
        return split(request, self.train, self.test, retain)

    def original(self, seed: int) -> ViTForImageClassification:
        return train_on(self.train, seed, self.work, f"original-{seed}")

    def retrained(self, request: Request) -> ViTForImageClassification:
        sets = split(request, self.train, self.test, "0.05")
        return train_on(sets["others"], request.seed, self.work, f"retrained-{request}")

    def attacks(self, request: Request, sets: dict) -> Callable:
        """The attacker fine-tunes on a fifth of the forget set; of a class, on images of it that were never trained on."""
        known = sets["validation_unseen"] if request.kind == "class" else sets["forget"]
        return attacks_of(
            known.select(np.arange(min(100, len(known)))),
            max_steps=25,
            learning_rate=1e-4,
            batch_size=32,
            steps=(1, 2, 5, 10, 25),
        )


def make_study(arguments: argparse.Namespace) -> ImageStudy:
    return ImageStudy(arguments.data_folder, arguments.work_folder, Records(RESULTS / "study_images.json"))


def add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_folder", type=Path, required=True)
    parser.add_argument("--work_folder", type=Path, default=Path("out/studies/images"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    main(make_study, parser)
