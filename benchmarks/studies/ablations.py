"""What of OrthoGrad matters: per-sample or mean projection, the retain term, k, LoRA, the solver's iterations.

    python benchmarks/studies/ablations.py --data_folder <CIFAR-10 as parquet>

The image study's models, sets, steps and stopping rule, at 5 % retain data; each variant changes one thing in OrthoGrad with ascent at a
learning rate of 1e-4 (LoRA: 1e-3). Settings are not chosen anew for each variant. Several processes, each with other `--variants` or
`--seeds`, may work on the same results.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from harness import RESULTS, Records, machine_note
from images import ImageStudy, add_folders
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from study import add_variants, main
from tables import COLUMNS, cells, gap, peaks_of, to_markdown
from transformers import set_seed


BASE = "OrthoGrad, k = 64, alpha = 0.5"
LORA = "LoRA"
RATES = {("scrub", "class"): 3e-5}  # as chosen in the image study; all others do well at 1e-4
WITHOUT_RULE = {"eval_strategy": "no", "forget_target": None}

# name: (method, what changes)
VARIANTS = {
    BASE: ("orthograd", {}),
    "no projection": ("graddiff", {}),
    "mean projection": ("mean_projection", {}),
    "tensor by tensor": ("orthograd", {"projection_scope": "per_tensor"}),
    "update corrected": ("orthograd", {"projection_target": "update"}),
    **{f"k = {k}": ("orthograd", {"per_device_train_batch_size": k}) for k in (2, 4, 8, 16, 32, 128)},
    **{f"mean projection, k = {k}": ("mean_projection", {"per_device_train_batch_size": k}) for k in (8, 128)},
    **{f"alpha = {alpha}": ("orthograd", {"alpha": alpha}) for alpha in (0.0, 0.1, 0.3, 0.7, 0.9)},
    "no projection, alpha = 0.9": ("graddiff", {"alpha": 0.9}),
    **{
        f"{number} iterations of cg": ("orthograd", {"projection_solver": "cg", "projection_iterations": number})
        for number in (1, 3, 10)
    },
    "NPO": ("orthograd_npo", {}),
    "NPO, no projection": ("npo", {}),
    "SimNPO": ("orthograd", {"forget_loss": "simnpo"}),
    "SimNPO, no projection": ("simnpo", {}),
    "NPO, update corrected": ("orthograd_npo", {"projection_target": "update"}),
    "all 48 steps": ("orthograd", WITHOUT_RULE),
    "no projection, all 48 steps": ("graddiff", WITHOUT_RULE),
    "NPO, all 48 steps": ("orthograd_npo", WITHOUT_RULE),
    "NPO, no projection, all 48 steps": ("npo", WITHOUT_RULE),
    "NPO, all 48 steps, k = 128": ("orthograd_npo", WITHOUT_RULE | {"per_device_train_batch_size": 128}),
    "NPO, k = 128": ("orthograd_npo", {"per_device_train_batch_size": 128}),
    "NPO, no projection, 128 retain samples": ("npo", {"per_device_train_batch_size": 128}),
    **{f"no projection, {k} retain samples": ("graddiff", {"per_device_train_batch_size": k}) for k in (2, 8, 128)},
    "retain gradients of 3 steps before, too": ("orthograd_memory", {}),
    "NPO, retain gradients of 3 steps before, too": ("orthograd_memory", {"forget_loss": "npo"}),
    "SCRUB, 128 retain samples": ("scrub", {"per_device_train_batch_size": 128}),
    "LoRA": ("orthograd", {LORA: True}),
    "LoRA, no projection": ("graddiff", {LORA: True}),
    "LoRA, alpha = 0": ("orthograd", {LORA: True, "alpha": 0.0}),
    "LoRA, no projection, alpha = 0": ("gradient_ascent", {LORA: True}),
}


# for the plot: over what, and for each curve the variants on it
CURVES = {
    "k, retain samples a step": {
        "per-sample projection": {k: f"k = {k}" for k in (2, 4, 8, 16, 32)} | {64: BASE, 128: "k = 128"},
        "mean projection": {8: "mean projection, k = 8", 64: "mean projection", 128: "mean projection, k = 128"},
        "no projection": {k: f"no projection, {k} retain samples" for k in (2, 8, 128)} | {64: "no projection"},
    },
    "alpha, weight of the retain term": {
        "per-sample projection": {alpha: f"alpha = {alpha}" for alpha in (0.0, 0.1, 0.3)}
        | {0.5: BASE, 0.7: "alpha = 0.7", 0.9: "alpha = 0.9"},
        "no projection": {0.5: "no projection", 0.9: "no projection, alpha = 0.9"},
    },
}


class Ablations(ImageStudy):
    """Each variant on each request; only stages differ from the image study: `final`, `memory` and `report`."""

    variants = tuple(VARIANTS)  # those run now
    lora = False

    def original(self, seed: int):
        model = super().original(seed)
        if not self.lora:
            return model
        set_seed(seed)  # an adapter is drawn
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
        return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))

    def stage_final(self) -> None:
        for variant in self.variants:
            for seed in self.seeds:
                for kind in self.kinds:
                    run = variant, self.request(kind, seed)
                    # records from before variants were attacked are made again
                    self.records.get(f"{variant} {run[1]}", lambda run=run: self.vary(*run), complete="int4")

    def vary(self, variant: str, request) -> dict:
        with self.settings(variant, request.kind) as (method, setting, extra):
            return self.unlearn(request, method, setting, "0.05", attacked=True, extra=extra)

    @contextmanager
    def settings(self, variant: str, kind: str) -> Iterator[tuple[str, float, dict]]:
        """A variant's method, learning rate and changed entries; within it original models get its adapter, if any."""
        method, changes = VARIANTS[variant]
        self.lora = LORA in changes
        extra = {name: value for name, value in changes.items() if name != LORA}
        try:
            yield method, 1e-3 if self.lora else RATES.get((method, kind), 1e-4), extra
        finally:
            self.lora = False

    def stage_memory(self) -> None:
        for variant in self.variants:
            self.memory(variant, "--variants")

    def stage_peak(self) -> None:
        with self.settings(*self.variants, self.kinds[0]) as settings:
            self.peak(*settings)

    def stage_report(self) -> None:
        """Of each kind the seeds that the base has; variants that lack one of them are left out."""
        parts, peaks = [], peaks_of(self.records.runs, {variant: variant for variant in VARIANTS})
        for kind in self.kinds:
            seeds = [seed for seed in self.seeds if f"{BASE} {kind}-{seed}" in self.records.runs]
            requests = [self.request(kind, seed) for seed in seeds]
            known = [[self.reference(what, one) for one in requests] for what in ("original", "retrained")]
            rows = {"original": (known[0], None), "retrained": (known[1], None)}
            for variant in VARIANTS:
                records = [self.records.runs.get(f"{variant} {request}") for request in requests]
                if None not in records:
                    rows[variant] = (records, records)
            shown = {label: (cells(records, *known, self.better), runs) for label, (records, runs) in rows.items()}
            title = f"## {kind}, {len(seeds)} seeds" if len(seeds) > 1 else f"## {kind}, one seed"
            parts.append(f"{title}\n\n{to_markdown(shown, COLUMNS, peaks)}")
        (RESULTS / "study_ablations.md").write_text("# Ablations\n\n" + "\n\n".join([*parts, machine_note()]) + "\n")
        self.plot(RESULTS / "study_ablations.png")

    def plot(self, path: Path) -> None:
        """The gap to the retrained model over k and over alpha, a row for each kind: means, and the seeds' extremes."""
        figure = Figure(figsize=(11, 7), layout="constrained")
        rows = figure.subplots(len(self.kinds), len(CURVES), sharey="row")
        for panels, kind in zip(rows, self.kinds, strict=True):
            for axes, (quantity, curves) in zip(panels, CURVES.items(), strict=True):
                for label, points in curves.items():
                    found = {at: self.gaps(variant, kind) for at, variant in points.items()}
                    found = {at: gaps for at, gaps in sorted(found.items()) if gaps}
                    means = [np.mean(gaps) for gaps in found.values()]
                    below = [mean - min(gaps) for mean, gaps in zip(means, found.values(), strict=True)]
                    above = [max(gaps) - mean for mean, gaps in zip(means, found.values(), strict=True)]
                    axes.errorbar(list(found), means, [below, above], marker=".", capsize=3, label=label)
                axes.set(xlabel=quantity, ylabel=f"average gap, {kind}")
                axes.legend(fontsize="small")
                if quantity.startswith("k"):
                    axes.set_xscale("log", base=2)
        figure.savefig(path, dpi=90)

    def gaps(self, variant: str, kind: str) -> list[float]:
        requests = [self.request(kind, seed) for seed in self.seeds]
        records = {request: self.records.runs.get(f"{variant} {request}") for request in requests}
        return [gap(one, self.reference("retrained", request)) for request, one in records.items() if one is not None]


def make_study(arguments: argparse.Namespace) -> Ablations:
    records = Records(RESULTS / "study_ablations.json"), Records(RESULTS / "study_images.json")
    study = Ablations(arguments.data_folder, arguments.work_folder, *records)
    study.variants = tuple(arguments.variants)
    return study


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    add_variants(parser, VARIANTS)
    main(make_study, parser, ("final", "memory", "report"))
