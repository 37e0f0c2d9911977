"""Five requests in turn: do earlier ones come back, and does a model that was unlearned stay so when it is trained on?

    python benchmarks/studies/sequences.py --data_folder <CIFAR-10 as parquet>

The image study's models: 5 % of the training images are to be forgotten, a fifth of them in each of five requests, with 5 % of the rest
at hand. The retrained model never saw any of them. Each run starts from the model that the request before left, which is NPO's
reference and what the stopping rule's level is measured on; "kl" holds to that model, or to the original. "Retraining after each" trains anew
without all requests so far, by another seed than the model that gaps are to. Then some variants' last models are trained for two epochs on new
images, alone and with the first request's images among them, watched and held. Resumable.
"""

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from harness import RESULTS, Records, machine_note
from image_data import Images, Request, VariedImages, learn, untrained
from images import ImageStudy, add_folders
from matplotlib.figure import Figure
from methods import unlearn
from retention import KL
from study import CHOSEN_AT, add_variants, main
from tables import gap, mean_and_interval
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

from hf_orthograd.evaluation import membership_inference
from hf_orthograd.requests import StaysForgotten


REQUESTS, EPOCHS = 5, 2
RETRAINING = "retraining after each"
OTHER_SEED = 100  # more than that of the model that gaps are to: by the same one, the last would be that model
OURS = "OrthoGrad + NPO, kl, varied"


@dataclass(frozen=True)
class Variant:
    """A way through the requests.

    Attributes:
        method, rate, extra: As [`unlearn`] takes them.
        varied (`bool`): Whether retain images are varied.
        held (`bool`): Whether the images of earlier requests are held to the last model's predictions.
        to_original (`bool`): Whether retain images are held to the original's predictions.
    """

    method: str
    rate: float | None  # None: as the original was trained
    extra: dict = field(default_factory=dict)
    varied: bool = False
    held: bool = False
    to_original: bool = False


_VARIED = {"extra": KL, "varied": True}
VARIANTS = {
    "all at once": Variant("orthograd_npo", 1e-4, **_VARIED),
    OURS: Variant("orthograd_npo", 1e-4, **_VARIED),
    f"{OURS}, 3e-5": Variant("orthograd_npo", 3e-5, **_VARIED),
    f"{OURS}, earlier held": Variant("orthograd_npo", 1e-4, **_VARIED, held=True),
    f"{OURS}, to the original": Variant("orthograd_npo", 1e-4, **_VARIED, to_original=True),
    f"{OURS}, to the original, 3e-5": Variant("orthograd_npo", 3e-5, **_VARIED, to_original=True),
    "OrthoGrad + NPO": Variant("orthograd_npo", 1e-4),
    "NPO, kl, varied": Variant("npo", 1e-4, **_VARIED),
    "NPO, kl, varied, to the original, 3e-5": Variant("npo", 3e-5, **_VARIED, to_original=True),
    "NPO": Variant("npo", 1e-4),
    "ONPO": Variant("onpo", 1e-4),
    "ONPO, kl, varied, to the original, 3e-5": Variant("onpo", 3e-5, **_VARIED, to_original=True),
    "GradDiff": Variant("graddiff", 3e-5),
    RETRAINING: Variant("retraining", None),
}
ONCE = "all at once"
TRAINED_ON = (
    ONCE,
    f"{OURS}, to the original, 3e-5",
    "OrthoGrad + NPO",
    "ONPO",
    "ONPO, kl, varied, to the original, 3e-5",
)


@dataclass(frozen=True)
class Further:
    """How the last model is trained on: with what was forgotten held or watched only, and how many times as long as the shortest."""

    hold: bool
    times: int = 1


HOW = {"watched": Further(False), "held at their level": Further(True)}
NEW_DATA = {"new": False, "new with request 1": True}  # whether the first request's images are among the new ones


_NOTE = """"kl" holds retain images to the predictions of the model before, "to the original" to those of the model before any request. Learning rates are those of the study of retain terms for all five requests at once, 1e-4 (GradDiff 3e-5), where no other is named; retraining is as the original's training, by another seed than the model that gaps are to, and its time without evaluations. Accuracies after the last request. The gap is the mean distance to the model retrained without all five over accuracies on forgotten, retained and \
test images and the AUC of membership inference. "Came back": accuracy on the first request's images after the last request less that after the first. Means \
over seeds with 95 % intervals by Student's t; differences are paired."""

_CONTINUED_NOTE = f"""{EPOCHS} epochs on 500 new images ("new"), and on these with the first request's images among them. By how much accuracy on those rises, watched \
only and held by `StaysForgotten`, and accuracy on test images, which stands for the new task."""


class SequenceStudy(ImageStudy):
    """`choices` are the ways through the requests, of which `variants` are run now; `ours` must be among the table's."""

    name, kinds, seeds = "sequences", ("random",), (0, 1, 2)
    choices, ours = VARIANTS, OURS
    what, note, continued_note = "requests", _NOTE, _CONTINUED_NOTE
    metric, task = "accuracy", "test"  # what the curves show; the set that stands for the new task
    # the variants whose last model is trained on, on what, and how
    trained_on, new_data, how = TRAINED_ON, NEW_DATA, HOW
    variants = tuple(VARIANTS)

    def parts(self, request: Request) -> list[Images]:
        """The forget set, as five requests."""
        forget = self.sets(request, CHOSEN_AT)["forget"]
        return [forget.select(rows) for rows in np.array_split(np.arange(len(forget)), REQUESTS)]

    def at_hand(self, retain: Images, earlier: list[Images], varied: bool) -> Images:
        """What retain gradients are taken of."""
        make = VariedImages if varied else Images
        return make(retain.pixels, retain.labels, np.concatenate([retain.rows, *(part.rows for part in earlier)]))

    def untrained(self, request: Request, seed: int):
        return untrained(seed)

    def learn(self, model, request: Request, seed: int, number: int) -> int:
        """Trains the model without the first `number` requests, and returns in how many steps."""
        sets, later = self.sets(request, CHOSEN_AT), self.parts(request)[number:]
        rows = np.concatenate([sets["others"].rows, *(part.rows for part in later)])
        return learn(model, Images(self.train.pixels, self.train.labels, rows), seed, self.work)

    def retrain(self, request: Request) -> tuple[dict, object]:
        """Trains anew after each request; returns what [`carry_out`] does."""
        after, steps, seconds = [], [], 0.0
        seed = request.seed + OTHER_SEED
        for number in range(1, REQUESTS + 1):
            model = self.untrained(request, seed)
            started = time.perf_counter()
            steps.append(self.learn(model, request, seed, number))
            seconds += time.perf_counter() - started
            after.append(self.measured(model, request))
        return {"after": after, "steps": steps, "seconds": seconds}, model

    def carry_out(self, variant: str, request: Request) -> tuple[dict, object]:
        """Goes through the requests; returns the record and the last model."""
        own = self.choices[variant]
        if variant == RETRAINING:
            return self.retrain(request)
        sets, parts, bench = self.sets(request, CHOSEN_AT), self.parts(request), self.bench(request.kind)
        if own.to_original:
            bench.shared = bench.shared | {"ref_model": self.original(request.seed)}
        model, after, steps, seconds = self.original(request.seed), [], [], 0.0
        for number, part in enumerate([sets["forget"]] if variant == ONCE else parts):
            retain = self.at_hand(sets["retain"], parts[:number] if own.held else [], own.varied)
            now = sets | {"forget": part, "retain": retain}
            trainer, record = unlearn(bench, own.method, own.rate, model, now, request.seed, own.extra)
            model = trainer.model
            if own.method == "onpo":  # what it has of earlier requests
                bench.shared = bench.shared | {"earlier": trainer.directions}
            steps.append(record["steps"])
            seconds += record["seconds"]
            after.append(self.measured(model, request))
        return {"after": after, "steps": steps, "seconds": seconds}, model

    def run(self, variant: str, request: Request) -> dict:
        record, model = self.carry_out(variant, request)
        if variant in self.trained_on:
            self.keep(model, variant, request)
        return record

    def keep(self, model, variant: str, request: Request) -> None:
        partial = self.last(variant, request).with_suffix(".partial")
        torch.save(model.state_dict(), partial)
        partial.replace(self.last(variant, request))

    def last(self, variant: str, request: Request) -> Path:
        """Where the weights after the last request are kept, to train on from."""
        return self.work / f"last-{variant.replace(' ', '-')}-{request}.pt"

    def trained_further(self, variant: str, request: Request, again: bool, further: Further) -> dict:
        if not self.last(variant, request).exists():
            recorded = self.records.runs[f"{variant} {request}"]["after"][-1]
            record, model = self.carry_out(variant, request)
            if record["after"][-1] != recorded:
                raise ValueError(
                    f"{variant!r}, seed {request.seed}, ended with {record['after'][-1]}, and not as recorded, {recorded}: delete its records."
                )
            self.keep(model, variant, request)
        model = self.original(request.seed)
        model.load_state_dict(torch.load(self.last(variant, request)))
        self.train_on(model, request, again, further)
        return self.measured(model, request)

    def train_on(self, model, request: Request, again: bool, further: Further) -> None:
        """On new images, with those of the first request among them if `again`."""
        sets, parts = self.sets(request, CHOSEN_AT), self.parts(request)
        new = sets["proxy"]
        rows = [new[row] for row in range(len(new))] + [parts[0][row] for row in range(len(parts[0]) if again else 0)]
        set_seed(request.seed)
        args = TrainingArguments(
            str(self.work / "continued"), num_train_epochs=further.times * EPOCHS, per_device_train_batch_size=64, learning_rate=1e-4,
            save_strategy="no", report_to="none", disable_tqdm=True, seed=request.seed, logging_steps=1000,
        )  # fmt: skip
        stays = StaysForgotten(sets["forget"], default_data_collator, hold=further.hold, batch_size=64)
        Trainer(model, args, train_dataset=rows, callbacks=[stays]).train()

    def measured(self, model, request: Request) -> dict:
        """Accuracy and loss on each request's images and the other sets, and the AUC of forgotten against test images."""
        sets = self.sets(request, CHOSEN_AT)
        named = {"forget": sets["forget"], "retain": sets["retain_measured"], "test": sets["test"]}
        named |= {f"request {number}": part for number, part in enumerate(self.parts(request), start=1)}
        found = {name: _losses_and_hits(model, images) for name, images in named.items()}
        auc = membership_inference(found["forget"][0], found["test"][0]).auc
        quality = {name: [float(hits.mean()), float(losses.mean())] for name, (losses, hits) in found.items()}
        return {"quality": quality, "auc": {"test": auc}}

    def reference(self, what: str, request: Request) -> dict:
        def make() -> dict:
            model = self.original(request.seed) if what == "original" else self.retrained(request)
            return self.measured(model, request)

        return self.records.get(f"{what} {request}", make)

    def stage_final(self) -> None:
        for seed in self.seeds:
            request = self.request(self.kinds[0], seed)
            for what in ("original", "retrained"):
                self.reference(what, request)
            for variant in self.variants:
                name = f"{variant} {request}"
                self.records.get(name, lambda run=(variant, request): self.run(*run))
                for new, again in self.new_data.items() if variant in self.trained_on else ():
                    for how, further in self.how.items():
                        run = (variant, request, again, further)
                        self.records.get(f"{name}: {new}, {how}", lambda run=run: self.trained_further(*run))

    def stage_report(self) -> None:
        write_report(self.records.runs, RESULTS / f"study_{self.name}", type(self))


@torch.no_grad()
def _losses_and_hits(model, images: Images) -> tuple[np.ndarray, np.ndarray]:
    model.eval()
    logits = torch.cat([model(pixel_values=images.pixels[rows]).logits for rows in np.array_split(images.rows, 8)])
    labels = images.labels[images.rows]
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return losses.numpy().astype(float), (logits.argmax(-1) == labels).numpy()


def write_report(runs: dict, path: Path, study: type[SequenceStudy] = SequenceStudy) -> None:
    """Tables of the variants that were run for the same seeds as the default, and curves over requests."""
    kind = study.kinds[0]
    seeds = [seed for seed in study.seeds if all(f"{name} {kind}-{seed}" in runs for name in (ONCE, study.ours))]
    if not seeds:
        return
    found = {name: [runs.get(f"{name} {kind}-{seed}") for seed in seeds] for name in study.choices}
    found = {name: own for name, own in found.items() if None not in own}
    # by variant, and by new data and how: a record of each seed
    further = {
        name: {
            way: [runs.get(f"{name} {kind}-{seed}: {way}") for seed in seeds]
            for way in (f"{new}, {how}" for new in study.new_data for how in study.how)
        }
        for name in study.trained_on
        if name in found
    }
    references = {what: [runs[f"{what} {kind}-{seed}"] for seed in seeds] for what in ("original", "retrained")}
    title = f"# Five {study.what} in turn, {f'{len(seeds)} seeds' if len(seeds) > 1 else 'one seed'}"
    parts = [title, study.note, _sequence_table(found, references)]
    parts += [
        "## Trained on",
        study.continued_note,
        _continued_table(found, further, study),
        machine_note(),
    ]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    _plot(found, references["retrained"], path.with_suffix(".png"), study.metric)


def _sequence_table(found: dict, references: dict) -> str:
    retrained = references["retrained"]
    last = {name: [record["after"][-1] for record in own] for name, own in found.items()}
    gaps = {
        name: np.array([gap(*pair) for pair in zip(own, retrained, strict=True)])
        for name, own in (references | last).items()
    }
    heads = [
        "method",
        "forgotten",
        "retained",
        "test",
        "AUC",
        "gap",
        f"gap less that of {ONCE}",
        "came back",
        "steps",
        "time (s)",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, own in (references | last).items():
        cells = [
            mean_and_interval([record["quality"][of][0] for record in own]) for of in ("forget", "retain", "test")
        ]
        cells += [mean_and_interval([record["auc"]["test"] for record in own]), mean_and_interval(gaps[name])]
        if name in found:
            records = found[name]
            rises = [
                record["after"][-1]["quality"]["request 1"][0] - record["after"][0]["quality"]["request 1"][0]
                for record in records
            ]
            cells += ["" if name == ONCE else mean_and_interval(gaps[name] - gaps[ONCE])]
            cells += ["" if name == ONCE else mean_and_interval(rises)]
            cells += [f"{np.median([sum(record['steps']) for record in records]):g}"]
            cells += [f"{np.median([record['seconds'] for record in records]):.0f}"]
        else:
            cells += [""] * 4
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def _continued_table(found: dict, further: dict, study: type[SequenceStudy]) -> str:
    """Of the variants that were trained on in each way, for each seed."""
    columns = [(name, of, how) for name in study.new_data for of in ("request 1", study.task) for how in study.how]
    heads = [
        f"{name}: {'' if of == 'request 1' else f'{of}, '}{how.replace(' at their level', '')}"
        for name, of, how in columns
    ]
    lines = ["| " + " | ".join(["method", *heads]) + " |", "|---" * (1 + len(heads)) + "|"]
    for variant, ways in further.items():
        if any(None in records for records in ways.values()):
            continue
        starts = [record["after"][-1]["quality"]["request 1"][0] for record in found[variant]]
        cells = []
        for name, of, how in columns:
            values = [record["quality"][of][0] for record in ways[f"{name}, {how}"]]
            cells.append(mean_and_interval(np.subtract(values, starts if of == "request 1" else 0.0)))
        lines.append("| " + " | ".join([variant, *cells]) + " |")
    return "\n".join(lines)


def _plot(found: dict, retrained: list[dict], path: Path, metric: str) -> None:
    """The metric on the first request's samples, on all forgotten so far, and on test samples, over the requests."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    first, so_far, test = figure.subplots(1, 3)
    for name, own in found.items():
        if name == ONCE:
            continue
        after = np.arange(1, REQUESTS + 1)
        quality = [[one["quality"] for one in record["after"]] for record in own]
        first.plot(
            after, np.mean([[one["request 1"][0] for one in each] for each in quality], axis=0), ".-", label=name
        )
        means = [
            [
                np.mean([one[f"request {number}"][0] for number in range(1, count + 1)])
                for count, one in enumerate(each, start=1)
            ]
            for each in quality
        ]
        so_far.plot(after, np.mean(means, axis=0), ".-", label=name)
        test.plot(after, np.mean([[one["test"][0] for one in each] for each in quality], axis=0), ".-", label=name)
    for axes, title, of in (
        (first, "the first request's samples", "request 1"),
        (so_far, "all forgotten so far", "forget"),
        (test, "test samples", "test"),
    ):
        axes.axhline(
            np.mean([record["quality"][of][0] for record in retrained]), color="gray", linestyle=":", label="retrained"
        )
        axes.set(xlabel="requests carried out", ylabel=metric, title=title, xticks=range(1, REQUESTS + 1))
    first.legend(fontsize="x-small")
    figure.savefig(path, dpi=90)


def make_study(arguments: argparse.Namespace) -> SequenceStudy:
    study = SequenceStudy(arguments.data_folder, arguments.work_folder, Records(RESULTS / "study_sequences.json"))
    study.variants = tuple(arguments.variants)
    return study


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    add_variants(parser, VARIANTS)
    main(make_study, parser, ("final", "report"), ())
