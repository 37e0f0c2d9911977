"""What do k and alpha do under the retain term "kl", and where is the projection worth its cost?

    python benchmarks/studies/curves.py --data_folder <CIFAR-10 as parquet>

The image study's models, sets, steps and stopping rule, with 5 % of the retain set at hand, varied at each step. OrthoGrad + NPO beside NPO
at every point, at a learning rate of 1e-4: settings are not chosen anew. Compared by pairs of the same seed. A class has seeds of its own
(`--kinds class --seeds 8 9 10`): those whose retrained models come from the machine that ran it. Several processes, each with other `--seeds` or
`--kinds`, may work on the same results.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from harness import RESULTS, Records, machine_note
from image_data import Request
from images import ImageStudy, add_folders
from matplotlib.figure import Figure
from retention import KL, RetentionStudy
from study import CHOSEN_AT, main
from tables import gap, mean_and_interval


RATE = 1e-4
METHODS = {"orthograd_npo": "OrthoGrad + NPO", "npo": "NPO"}
SEEDS = {"random": (0, 1, 2, 3, 4), "class": (8, 9, 10)}  # of which the report takes those that have every point
USUAL = {"per_device_train_batch_size": 64, "alpha": 0.5}
# of each quantity the values tried; the other is as usual
CURVES = {
    "k, retain samples a step": ("per_device_train_batch_size", (4, 8, 16, 32, 64, 128, 256)),
    "alpha, weight of the retain term": ("alpha", (0.1, 0.3, 0.5, 0.7, 0.9)),
}


class Curves(RetentionStudy):
    """Records of runs are its own; those of the original and the retrained models are of the study of retain terms."""

    name, seeds = "curves", SEEDS["random"]
    varied = True

    def __init__(self, data_folder: Path, work_folder: Path, records: Records, references: Records):
        ImageStudy.__init__(self, data_folder, work_folder, records, references)

    def point(self, method: str, settings: dict, request: Request) -> dict:
        return self.records.get(
            name_of(method, settings, request),
            lambda: self.unlearn(request, method, RATE, CHOSEN_AT, attacked=False, extra=KL | settings),
        )

    def stage_final(self) -> None:
        for kind in self.kinds:
            for seed in self.seeds:
                for quantity, values in CURVES.values():
                    for value in values:
                        for method in METHODS:
                            self.point(method, USUAL | {quantity: value}, self.request(kind, seed))

    def stage_report(self) -> None:
        write_report(self.records.runs, self.references.runs, RESULTS / f"study_{self.name}")


def name_of(method: str, settings: dict, request: Request) -> str:
    return f"{method} {request} " + " ".join(f"{name}={value:g}" for name, value in settings.items())


def write_report(runs: dict, references: dict, path: Path) -> None:
    """A table for each kind and quantity, of the seeds for which every point was run, and a plot of them all."""
    parts, panels = ['# k and alpha under the retain term "kl"', _NOTE], {}
    for kind in ImageStudy.kinds:
        for what, (quantity, values) in CURVES.items():
            found = {
                value: {
                    method: [
                        runs.get(name_of(method, USUAL | {quantity: value}, Request(kind, seed)))
                        for seed in SEEDS[kind]
                    ]
                    for method in METHODS
                }
                for value in values
            }
            whole = [
                number
                for number in range(len(SEEDS[kind]))
                if all(own[number] for point in found.values() for own in point.values())
            ]
            seeds = [SEEDS[kind][number] for number in whole]
            if len(seeds) > 1:
                retrained = [references[f"retrained {kind}-{seed}"] for seed in seeds]
                gaps = {
                    value: {
                        method: np.array([gap(own[n], one) for n, one in zip(whole, retrained, strict=True)])
                        for method, own in point.items()
                    }
                    for value, point in found.items()
                }
                panels[kind, what] = gaps
                steps = {
                    value: {
                        method: np.median([own[number]["steps"] for number in whole]) for method, own in point.items()
                    }
                    for value, point in found.items()
                }
                parts.append(f"## {kind}, {what}, {len(seeds)} seeds\n\n{_table(what.split(',')[0], gaps, steps)}")
    if not panels:
        return
    path.with_suffix(".md").write_text("\n\n".join([*parts, machine_note()]) + "\n")
    _plot(panels, path.with_suffix(".png"))


_NOTE = f"""The gap is the mean distance to the retrained model over accuracies on forgotten, retained and test images and the AUC of membership inference. \
Means over seeds with 95 % intervals by Student's t; differences are paired by seed: above zero, the projection is nearer. The retain images are \
varied at each step. k is {USUAL["per_device_train_batch_size"]} and alpha {USUAL["alpha"]} where not said otherwise. Learning rate {RATE:g}. Random images were run on an AMD EPYC, a class on an Intel Xeon."""


def _table(head: str, gaps: dict, steps: dict) -> str:
    own, other = METHODS
    heads = [head, *METHODS.values(), "NPO less OrthoGrad + NPO", "steps, OrthoGrad + NPO", "steps, NPO"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for value, point in gaps.items():
        cells = [f"{value:g}", *(mean_and_interval(point[method]) for method in METHODS)]
        cells += [mean_and_interval(point[other] - point[own]), *(f"{steps[value][method]:g}" for method in METHODS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plot(panels: dict, path: Path) -> None:
    """Means and the seeds' extremes."""
    count = math.ceil(len(panels) / len(CURVES))
    figure = Figure(figsize=(5.5 * len(CURVES), 3.5 * count), layout="constrained")
    rows = figure.subplots(count, len(CURVES), squeeze=False)
    for axes, ((kind, what), gaps) in zip(rows.flat, panels.items(), strict=False):
        for method, label in METHODS.items():
            values = [point[method] for point in gaps.values()]
            means = [one.mean() for one in values]
            spread = np.abs([[mean - one.min(), one.max() - mean] for mean, one in zip(means, values, strict=True)]).T
            axes.errorbar(list(gaps), means, spread, marker=".", capsize=3, label=label)
        axes.set(xlabel=what, ylabel=f"average gap, {kind}")
        axes.legend(fontsize="small")
        if what.startswith("k"):
            axes.set_xscale("log", base=2)
    for axes in rows.flat[len(panels) :]:
        axes.remove()
    figure.savefig(path, dpi=90)


def make_study(arguments: argparse.Namespace) -> Curves:
    records = Records(RESULTS / "study_curves.json"), Records(RESULTS / "study_retention.json")
    study = Curves(arguments.data_folder, arguments.work_folder, *records)
    study.kinds = tuple(arguments.kinds)
    return study


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    parser.add_argument("--kinds", nargs="+", choices=ImageStudy.kinds, default=ImageStudy.kinds)
    main(make_study, parser, ("models", "final", "report"))
