"""How are retain samples best held on to: by their labels or by the starting model's predictions, varied or not?

    python benchmarks/studies/retention.py --data_folder <CIFAR-10 as parquet>

The image study's models, sets, steps and stopping rule. Each variant has the same four learning rates to choose from, on validation
images at 5 % retain data with the first seed. "Update" was run for a class alone, and copies for 1 % of the retain images alone.
Seeds 8 to 19 (`--kinds class --seeds 8 9 ...`) are for a class alone: eight had not told SCRUB from the default.
Comparisons are paired by seed. Several processes, each with other `--variants` or `--seeds`, may work on the same results.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from harness import RESULTS, Records, machine_note
from image_data import Request, VariedImages
from images import ImageStudy, add_folders
from methods import METHODS, Method
from study import CHOSEN_AT, add_variants, main
from tables import choose, gap, mean_and_interval, recovery

from hf_orthograd.baselines import ScrubTrainer


DEFAULT = "OrthoGrad + NPO, kl, varied"


@dataclass(frozen=True)
class Variant:
    """A method with a retain term.

    Attributes:
        method (`str`): Among the studies' methods.
        extra (`dict`): What it sets beside.
        varied (`bool`): Whether the retain images at hand are varied at each step.
        sized (`tuple[str, ...]`): The other retain sizes at which it is compared, too.
        copies (`int`): How often each retain image is read where others are read once, to vary anew.
    """

    method: str
    extra: dict = field(default_factory=dict)
    varied: bool = False
    sized: tuple[str, ...] = ()
    copies: int = 1


def _scrub(weight: float) -> Method:
    def make(*args, **kwargs) -> ScrubTrainer:
        return ScrubTrainer(*args, retain_weight=weight, **kwargs)

    return Method(f"SCRUB, KL weight {weight:g}", trainer=make, rule=False, steps=2, compared=False)


METHODS["scrub_kl"] = _scrub(1.0)
SIZES = ("0.01", "0.2", "proxy")
LATER_SEEDS = tuple(range(8, 20))
KL = {"retain_loss": "kl"}
UPDATE = {"projection_target": "update"}
WIDE = KL | {"per_device_train_batch_size": 256}  # as many retain samples a step, or all 95 of 1 %; 64 otherwise
VARIANTS = {
    "NPO": Variant("npo", sized=SIZES),
    "GradDiff": Variant("graddiff", sized=SIZES),
    "SCRUB": Variant("scrub", sized=SIZES),
    "OrthoGrad + NPO": Variant("orthograd_npo", sized=SIZES),
    DEFAULT: Variant("orthograd_npo", KL, varied=True, sized=SIZES),
    "NPO, kl, varied": Variant("npo", KL, varied=True, sized=SIZES),
    "GradDiff, kl, varied": Variant("graddiff", KL, varied=True),
    "SCRUB, KL weight 1, varied": Variant("scrub_kl", varied=True),
    "SCRUB, KL weight 1": Variant("scrub_kl"),
    "SCRUB, varied": Variant("scrub", varied=True),
    "OrthoGrad + NPO, kl": Variant("orthograd_npo", KL),
    "NPO, kl": Variant("npo", KL),
    "OrthoGrad + NPO, varied": Variant("orthograd_npo", varied=True),
    "NPO, varied": Variant("npo", varied=True),
    "OrthoGrad, ascent, kl, varied": Variant("orthograd", KL, varied=True),
    "mean projection, kl, varied": Variant("mean_projection", KL, varied=True),
    "SimNPO, kl, varied": Variant("simnpo", KL, varied=True),
    "OrthoGrad + NPO, kl, varied, k = 256": Variant("orthograd_npo", WIDE, True, ("0.01",)),
    "NPO, kl, varied, k = 256": Variant("npo", WIDE, True),
    "OrthoGrad + NPO, kl, four varied copies, k = 256": Variant("orthograd_npo", WIDE, True, ("0.01",), copies=4),
    "NPO, kl, four varied copies, k = 256": Variant("npo", WIDE, True, ("0.01",), copies=4),
    "OrthoGrad + NPO, kl, varied, update": Variant("orthograd_npo", KL | UPDATE, varied=True),
    "OrthoGrad + NPO, update": Variant("orthograd_npo", UPDATE),
}
ATTACKED = (DEFAULT, "NPO, kl, varied", "OrthoGrad + NPO", "NPO")
COLUMNS = (
    "forget",
    "at hand",
    "retain",
    "test",
    "MIA AUC",
    "KS",
    "gap",
    "gap less that of the default",
    "steps",
    "rate",
)


class RetentionStudy(ImageStudy):
    name, seeds = "retention", tuple(range(8))
    variants = tuple(VARIANTS)  # those run now
    sizes = SIZES
    varied, copies = False, 1  # of the run at hand

    def run(self, variant: str, request: Request, setting: float, retain: str, attacked: bool = False) -> dict:
        own = VARIANTS[variant]
        self.varied, self.copies = own.varied, own.copies
        return self.unlearn(request, own.method, setting, retain, attacked, extra=own.extra)

    def sets(self, request: Request, retain: str) -> dict:
        sets = super().sets(request, retain)
        at_hand = sets["retain"]
        if self.varied:
            sets["retain"] = VariedImages(at_hand.pixels, at_hand.labels, np.tile(at_hand.rows, self.copies))
        return sets

    def chosen(self, kind: str, variant: str) -> float:
        request = self.request(kind, type(self).seeds[0])
        runs = {
            setting: self.records.get(
                f"tune {request} {variant} {setting:g}",
                lambda setting=setting: self.run(variant, request, setting, CHOSEN_AT),
            )
            for setting in self.grid
        }
        return choose(runs, self.reference("retrained", request))

    def final(self, request: Request, variant: str, retain: str) -> dict:
        setting = self.chosen(request.kind, variant)
        name = f"final {request} {retain} {variant}"
        return self.records.get(name, lambda: self.run(variant, request, setting, retain))

    def stage_tune(self) -> None:
        for kind in self.kinds:
            for variant in self.variants:
                self.chosen(kind, variant)

    def stage_final(self) -> None:
        for kind in self.kinds:
            for variant in self.variants:
                for seed in self.seeds:
                    self.final(self.request(kind, seed), variant, CHOSEN_AT)

    def stage_sizes(self) -> None:
        for kind in self.kinds:
            for retain in self.sizes:
                for variant in self.variants:
                    for seed in self.seeds if retain in VARIANTS[variant].sized else ():
                        self.final(self.request(kind, seed), variant, retain)

    def stage_attacks(self) -> None:
        """Once more as in the main table, and then rounded, and fine-tuned as in the image study."""
        for kind in self.kinds:
            for seed in self.seeds:
                request = self.request(kind, seed)
                self.reference("original", request)
                for variant in ATTACKED:
                    run = variant, request, self.chosen(kind, variant), CHOSEN_AT, True
                    self.records.get(f"attacked {request} {variant}", lambda run=run: self.run(*run))

    def stage_report(self) -> None:
        write_report(self.records.runs, RESULTS / f"study_{self.name}.md", [*ImageStudy.kinds], type(self).seeds)


def write_report(runs: dict, path: Path, kinds: list[str], seeds: tuple[int, ...]) -> None:
    """Tables of each kind of request and retain size, from finished runs; a variant that lacks a seed is left out."""
    parts = []
    for kind in kinds:
        for retain in (CHOSEN_AT, *RetentionStudy.sizes):
            what = "a proxy retain set" if retain == "proxy" else f"{float(retain):.0%} of the retain set at hand"
            for own_seeds in dict.fromkeys((tuple(seeds), LATER_SEEDS, (*range(LATER_SEEDS[0]), *LATER_SEEDS))):
                records = {
                    variant: [runs.get(f"final {kind}-{seed} {retain} {variant}") for seed in own_seeds]
                    for variant in VARIANTS
                }
                records = {variant: own for variant, own in records.items() if None not in own}
                if DEFAULT in records:
                    references = [runs[f"retrained {kind}-{seed}"] for seed in own_seeds]
                    which = "" if own_seeds == tuple(seeds) else f", {own_seeds[0]} to {own_seeds[-1]}"
                    title = f"## {kind}, {what}, {len(own_seeds)} seeds{which}"
                    parts.append(f"{title}\n\n{_table(records, references)}")
        attacked = _attack_table(runs, kind)
        if attacked:
            parts.append(f"## {kind}, attacked\n\n{_ATTACKS}\n\n{attacked}")
    path.write_text(f"# Retain terms\n\n{_NOTE}\n\n" + "\n\n".join([*parts, machine_note()]) + "\n")


_NOTE = """Means over seeds with 95 % intervals by Student's t. The gap is the mean distance to the retrained model over accuracies on forgotten, \
retained and test images and the AUC of membership inference. Its difference to the default's is paired by seed: above zero, the default is nearer. With 1 % at hand "k = 256" \
without copies is all 95 images. The last line is of the machine that wrote this: seeds 8 to 19 were run on an Intel Xeon, most others on an AMD EPYC, as the records say."""


def _table(records: dict[str, list[dict]], references: list[dict]) -> str:
    gaps = {
        variant: np.array([gap(*pair) for pair in zip(own, references, strict=True)])
        for variant, own in records.items()
    }
    lines = ["| method | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    lines.append("| retrained | " + " | ".join([*_measures(references), "0", "", "", ""]) + " |")
    for variant, own in records.items():
        difference = "" if variant == DEFAULT else mean_and_interval(gaps[variant] - gaps[DEFAULT])
        cells = [*_measures(own), mean_and_interval(gaps[variant]), difference]
        cells += [f"{np.median([record['steps'] for record in own]):g}", f"{own[0]['setting']:g}"]
        lines.append("| " + " | ".join([variant, *cells]) + " |")
    return "\n".join(lines)


_ATTACKS = """Accuracy on the forgotten images, as unlearned and after rounding of the weights. Relearning: the steps of fine-tuning after which half of what a retrained model lacks was back, \
for each seed. It is on 100 of the forgotten images, and of a class on images of it that were never trained on."""


def _attack_table(runs: dict, kind: str) -> str:
    """Of the seeds for which all were attacked; empty if there is none."""
    seeds = [s for s in RetentionStudy.seeds if all(f"attacked {kind}-{s} {variant}" in runs for variant in ATTACKED)]
    if not seeds:
        return ""
    originals, references = ([runs[f"{what} {kind}-{seed}"] for seed in seeds] for what in ("original", "retrained"))
    rows = {"original": originals, "retrained": references}
    rows |= {variant: [runs[f"attacked {kind}-{seed} {variant}"] for seed in seeds] for variant in ATTACKED}
    lines = ["| method | forget | int8 | int4 | relearning |", "|---|---|---|---|---|"]
    for label, records in rows.items():
        cells = [[record["quality"]["forget"][0] for record in records]]
        cells += [[record[bits]["forget"][0] for record in records] for bits in ("int8", "int4")]
        steps = [recovery(*three, RetentionStudy.better) for three in zip(records, originals, references, strict=True)]
        last = f"> {records[0]['relearning'][-1][0]}"
        counted = ", ".join(last if step is None else str(step) for step in steps)
        lines.append("| " + " | ".join([label, *map(mean_and_interval, cells), counted]) + " |")
    return "\n".join(lines)


def _measures(records: list[dict]) -> list[str]:
    named = ("forget", "at_hand", "retain", "test")
    found = [mean_and_interval([record["quality"][name][0] for record in records]) for name in named]
    found.append(mean_and_interval([record["auc"]["test"] for record in records]))
    distances = [record.get("ks", 0.0) for record in records]
    return [*found, mean_and_interval(distances)]


def make_study(arguments: argparse.Namespace) -> RetentionStudy:
    study = RetentionStudy(arguments.data_folder, arguments.work_folder, Records(RESULTS / "study_retention.json"))
    study.variants, study.kinds = tuple(arguments.variants), tuple(arguments.kinds)
    return study


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    add_variants(parser, VARIANTS)
    parser.add_argument("--kinds", nargs="+", choices=ImageStudy.kinds, default=ImageStudy.kinds)
    main(make_study, parser, ("models", "tune", "final", "sizes", "attacks", "report"))
