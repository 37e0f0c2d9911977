"""The stages of a study, the same for every modality: reference models, choice of settings, final runs, tables."""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from harness import RESULTS, Records
from methods import METHODS, Bench, measure_model, unlearn
from tables import choose, write_report
from torch import nn

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.evaluation import loss_distance


SELECTIONS = (2.0, 5.0, 10.0, 30.0)  # SSD's alpha, in place of a learning rate
CHOSEN_AT = "0.05"  # the share of retain data at which settings are chosen


class Study:
    """Compares the methods on requests, one for each kind and seed; a record is made once and kept.

    Attributes:
        name (`str`): Of its results.
        kinds, seeds (`tuple`): What is forgotten.
        grid (`tuple[float, ...]`): Learning rates to choose from.
        methods, sized (`tuple[str, ...]`): Those compared, and those compared at other retain sizes too.
        sizes (`tuple[str, ...]`): The other retain sizes.
        better (`int`): 1 if more of the metric is better, else -1.
    """

    name: str
    kinds: tuple[str, ...]
    seeds = (0, 1, 2)
    grid: tuple[float, ...]
    methods = tuple(name for name, method in METHODS.items() if method.compared)
    sized: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    better = 1
    command: list[str]  # that started the study

    def __init__(self, records: Records, references: Records | None = None):
        self.records = records
        self.references = references or records  # of the original and the retrained models

    def request(self, kind: str, seed: int):
        raise NotImplementedError

    def bench(self, kind: str) -> Bench:
        raise NotImplementedError

    def sets(self, request, retain: str) -> dict:
        raise NotImplementedError

    def original(self, seed: int) -> nn.Module:
        raise NotImplementedError

    def retrained(self, request) -> nn.Module:
        raise NotImplementedError

    def attacks(self, request, sets: dict) -> Callable:
        raise NotImplementedError

    def reference(self, what: str, request) -> dict:
        """The record of the original or of the retrained model."""

        def make() -> dict:
            bench, sets = self.bench(request.kind), self.sets(request, CHOSEN_AT)
            model = self.original(request.seed) if what == "original" else self.retrained(request)
            config = {name: value for name, value in bench.config.items() if name not in bench.rule}
            args = OrthoGradConfig(**config, report_to="none", disable_tqdm=True)
            trainer = OrthoGradTrainer(model, args, **bench.shared)
            return measure_model(bench, trainer, sets, self.attacks(request, sets))

        return self.references.get(f"{what} {request}", make)

    def unlearn(self, request, name: str, setting: float, retain: str, attacked: bool, extra=None) -> dict:
        bench, sets = self.bench(request.kind), self.sets(request, retain)
        attacks = self.attacks(request, sets) if attacked else None
        trainer, record = unlearn(bench, name, setting, self.original(request.seed), sets, request.seed, extra)
        record |= measure_model(bench, trainer, sets, attacks)
        reference = self.reference("retrained", request)
        record["ks"] = loss_distance(record.pop("forget_losses"), reference["forget_losses"])
        return record

    def chosen(self, kind: str, name: str) -> float:
        """The setting whose validation gap to the retrained model is smallest, with the first seed of the study."""
        request = self.request(kind, type(self).seeds[0])
        reference = self.reference("retrained", request)
        runs = {
            setting: self.records.get(
                f"tune {request} {name} {setting:g}",
                lambda setting=setting: self.unlearn(request, name, setting, CHOSEN_AT, attacked=False),
            )
            for setting in (SELECTIONS[: len(self.grid)] if name == "ssd" else self.grid)
        }
        return choose(runs, reference)

    def final(self, request, name: str, retain: str) -> dict:
        setting = self.chosen(request.kind, name)
        attacked = retain == CHOSEN_AT
        make = lambda: self.unlearn(request, name, setting, retain, attacked)  # noqa: E731
        return self.records.get(f"final {request} {retain} {name}", make)

    def stage_models(self) -> None:
        for kind in self.kinds:
            for seed in self.seeds:
                for what in ("original", "retrained"):
                    self.reference(what, self.request(kind, seed))

    def stage_tune(self) -> None:
        for name in self.methods:
            for kind in self.kinds:
                self.chosen(kind, name)

    def stage_final(self) -> None:
        for seed in self.seeds:
            for name in self.methods:
                for kind in self.kinds:
                    self.final(self.request(kind, seed), name, CHOSEN_AT)

    def stage_sizes(self) -> None:
        for retain in self.sizes:
            for seed in self.seeds:
                for name in self.sized:
                    for kind in self.kinds:
                        self.final(self.request(kind, seed), name, retain)

    def stage_memory(self) -> None:
        for name in self.methods:
            self.memory(name, "--methods")

    def memory(self, name: str, option: str) -> None:
        """Peak memory of a few steps of what `option` selects by name, in a process of its own."""
        command = [*self.command, "--stages", "peak", option, name]
        make = lambda: json.loads(  # noqa: E731
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
        self.records.get(f"memory {name}", make)

    def stage_peak(self) -> None:
        self.peak(*self.methods, SELECTIONS[0] if self.methods == ("ssd",) else self.grid[0], {})

    def peak(self, name: str, setting: float, extra: dict) -> None:
        """Prints the peak resident memory of this process while it unlearns, as Linux counts it."""
        request = self.request(self.kinds[0], self.seeds[0])
        bench, sets = self.bench(request.kind), self.sets(request, CHOSEN_AT)
        steps = {"max_steps": 3, "eval_strategy": "no", "forget_target": None}
        model = self.original(request.seed)
        Path("/proc/self/clear_refs").write_text("5")  # counts the peak from here: loading the data held more
        unlearn(bench, name, setting, model, sets, request.seed, extra | steps)
        status = Path("/proc/self/status").read_text()
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20
        print(json.dumps({"peak_memory_gib": peak}))

    def stage_report(self) -> None:
        for kind in self.kinds:
            started = {name.split(" ")[1] for name in self.records.runs if name.startswith("final ")}
            seeds = [seed for seed in self.seeds if f"{kind}-{seed}" in started]
            path = RESULTS / f"study_{self.name}_{kind}"
            write_report(self.records.runs, path, kind, seeds, (CHOSEN_AT, *self.sizes), self.better)


STAGES = ("models", "tune", "final", "sizes", "memory", "report")


def add_variants(parser: argparse.ArgumentParser, variants: Iterable[str]) -> None:
    names = list(variants)
    parser.add_argument(
        "--variants", nargs="+", choices=names, default=names, metavar="VARIANT", help="run now; all by default"
    )


def main(
    make_study: Callable[[argparse.Namespace], Study],
    parser: argparse.ArgumentParser,
    stages: tuple[str, ...] = STAGES,
    hidden: tuple[str, ...] = ("peak",),
) -> None:
    """Runs the stages that the command line names; `hidden` ones are run only if named."""
    parser.add_argument("--stages", nargs="+", default=stages, choices=[*stages, *hidden])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="those run now; the study's by default")
    parser.add_argument("--seeds", type=int, nargs="+", help="those run now; the study's by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    study = make_study(arguments)
    study.methods = tuple(arguments.methods or study.methods)
    study.seeds = tuple(arguments.seeds or study.seeds)
    study.command = [sys.executable, *sys.argv]
    for stage in arguments.stages:
        getattr(study, f"stage_{stage}")()
