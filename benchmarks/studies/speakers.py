"""What does it cost to make Whisper-tiny fail on speakers, and does the retain term lower it?

    python benchmarks/studies/speakers.py --model_folder <whisper-tiny.en> --data_folder <LibriSpeech as parquet>

One model is fine-tuned on utterances of at most 13 s of 28 speakers; each of seven seeds forgets four others of them. With `--kind speaker`
utterances last 8 s at most, and each of ten seeds forgets one speaker. A run ends when 90 % of the words of the forgotten utterances are wrong, of 12 of
them at most. NPO has the learning rates of OrthoGrad. "Encoder alone": the decoder is frozen. "Refusal": a full stop is taught as the
answer, which counts as no word. "Lower encoder": the upper half of the encoder is frozen, too. These were tried after the rest, refusal first on speaker 1, the lower half on 0 and 4. Speakers 5 to 9 were run when all that had been chosen. Variants are compared by pairs, at that point and where the forgotten
utterances' loss has reached a level. Several processes may work on the same results.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import concatenate_datasets
from erasure import Erasure
from harness import RESULTS, Records, machine_note
from methods import METHODS, Bench, unlearn
from speech import add_folders
from speech_data import GROUPS, SPEAKERS, Request, load_speech, split, train_on
from study import add_variants, main
from tables import mean_and_interval

from hf_orthograd.data import VarySpeech
from hf_orthograd.evaluation import Relearning, evaluate_unlearning


@dataclass(frozen=True)
class Kind:
    """What requests of a kind are like.

    Attributes:
        speakers (`int`): Named by each.
        seconds (`int`): Of the longest utterances.
        requests (`int`): How many there are, one for each seed.
        steps (`int`): The most of a run.
        level (`float`): Nats per token, at which runs are compared by loss.
        why (`str`): When that level was set.
        watched (`int`): Utterances of the test set that are evaluated while unlearning; of short ones half of all.
    """

    speakers: int
    seconds: int
    requests: int
    steps: int
    level: float
    why: str
    watched: int


_AFTER = "that was set after the first two requests: no run reached the 4 of before"
KINDS = {
    "speakers": Kind(speakers=4, seconds=13, requests=GROUPS, steps=40, level=1.0, why=_AFTER, watched=12),
    "speaker": Kind(
        speakers=1,
        seconds=8,
        requests=len(SPEAKERS),
        steps=60,
        level=4.0,
        why="that was set before any run",
        watched=27,
    ),
}
WRONG = 0.9  # the share of the forgotten utterances' words at which a run ends
WATCHED = 12  # utterances of the forget set that are evaluated while unlearning
KL = {"retain_loss": "kl"}
WIDE = {"per_device_train_batch_size": 32}

RATE = 3e-5
# at a third of the rate the steps between two evaluations, and the most steps, are three times as many
SLOW = {"max_steps": 120, "eval_steps": 6}


@dataclass(frozen=True)
class Variant:
    """A way to make the recogniser fail.

    Attributes:
        method, rate, extra: As [`unlearn`] takes them.
        varied (`bool`): Whether the retain utterances are varied.
        encoder_alone (`bool`): Whether the decoder stays as it is.
        lower_alone (`bool`): Whether the upper half of the encoder's layers stays, too.
        refuses (`bool`): Whether the answer [`REFUSAL`] is taught in place of ascending.
    """

    method: str
    rate: float = RATE
    extra: dict = field(default_factory=dict)
    varied: bool = False
    encoder_alone: bool = False
    lower_alone: bool = False
    refuses: bool = False


VARIANTS = {
    "NPO": Variant("npo"),
    "OrthoGrad + NPO": Variant("orthograd_npo"),
    "NPO, kl": Variant("npo", extra=KL),
    "OrthoGrad + NPO, kl": Variant("orthograd_npo", extra=KL),
    "NPO, kl, varied": Variant("npo", extra=KL, varied=True),
    "OrthoGrad + NPO, kl, varied": Variant("orthograd_npo", extra=KL, varied=True),
    "NPO, kl, rate 1e-5": Variant("npo", 1e-5, KL | SLOW),
    "OrthoGrad + NPO, kl, rate 1e-5": Variant("orthograd_npo", 1e-5, KL | SLOW),
    "NPO, kl, encoder alone": Variant("npo", extra=KL, encoder_alone=True),
    "OrthoGrad + NPO, kl, encoder alone": Variant("orthograd_npo", extra=KL, encoder_alone=True),
    "refusal, kl": Variant("npo", extra=KL, refuses=True),
    "OrthoGrad, refusal, kl": Variant("orthograd_npo", extra=KL, refuses=True),
    "refusal, kl, encoder alone": Variant("npo", extra=KL, encoder_alone=True, refuses=True),
    "OrthoGrad, refusal, kl, encoder alone": Variant("orthograd_npo", extra=KL, encoder_alone=True, refuses=True),
    "NPO, kl, lower encoder": Variant("npo", extra=KL, lower_alone=True),
    "OrthoGrad + NPO, kl, lower encoder": Variant("orthograd_npo", extra=KL, lower_alone=True),
    "refusal, kl, lower encoder": Variant("npo", extra=KL, lower_alone=True, refuses=True),
    "OrthoGrad, refusal, kl, lower encoder": Variant("orthograd_npo", extra=KL, lower_alone=True, refuses=True),
}
DEFAULT = "OrthoGrad + NPO, kl"
REFUSAL = "."  # counts as no word; the model's generation suppresses an answer of no token
SHARES = {"0.05": {}, "1": WIDE}
COLUMNS = ("forget", "forget_unseen", "retain", "test")
FRESH = tuple(range(5, 10))  # speakers on whom nothing was chosen
RELEARNED = (1, 3, 10)  # steps of the attacker after which the forgotten utterances are transcribed


class Speakers(Erasure):
    name = "speakers"
    variants, shares = tuple(VARIANTS), tuple(SHARES)  # those run now

    def __init__(
        self, model_folder: Path, data_folder: Path, work_folder: Path, records: Records, kind: str = "speakers"
    ):
        self.records = self.references = records
        self.kind, self.kinds, self.seeds = KINDS[kind], (kind,), tuple(range(KINDS[kind].requests))
        self.pretrained, self.work = model_folder, work_folder
        self.processor, self.corpus = load_speech(model_folder, data_folder, self.kind.seconds)

    def request(self, kind: str, seed: int) -> Request:
        return Request(seed, kind)

    def bench(self, kind: str) -> Bench:
        bench = super().bench(kind)
        bench.config["max_steps"] = self.kind.steps
        bench.evaluated = {"forget": "forget_watched", "test": "test_watched"}
        bench.measured = {name: name if name != "retain" else "retain_measured" for name in COLUMNS}
        return bench

    def sets(self, request: Request, retain: str) -> dict:
        """Nothing is chosen on validation utterances here: they are for the test, too."""
        sets = split(request, self.corpus, retain)
        sets["test"] = concatenate_datasets([sets["test"], sets["validation"]])
        watched = {"forget": WATCHED, "test": self.kind.watched}
        return sets | {
            f"{name}_watched": sets[name].take(min(most, len(sets[name]))) for name, most in watched.items()
        }

    def original(self, seed: int):
        seconds = self.kind.seconds
        return train_on([self.corpus["train"]], 0, self.pretrained, self.work, f"original-{seconds}s", seconds)

    def run(self, variant: str, request: Request, share: str) -> dict:
        own = VARIANTS[variant]
        sets = self.sets(request, share)
        if own.varied:
            sets["retain"] = sets["retain"].with_transform(VarySpeech(self.processor.feature_extractor))
        model, bench = self.original(request.seed), self.bench(request.kind)
        if own.encoder_alone or own.lower_alone:
            model.get_decoder().requires_grad_(False)  # and with it the tied output layer
        if own.lower_alone:
            encoder = model.get_encoder()
            encoder.layers[len(encoder.layers) // 2 :].requires_grad_(False)
            encoder.layer_norm.requires_grad_(False)
        extra = own.extra | SHARES[share]
        if own.refuses:
            # without the token that a decoder starts with, which labels do not hold either
            extra |= {"forget_loss": "refusal", "refusal_labels": self.processor.tokenizer(REFUSAL).input_ids[1:]}
        trainer, record = unlearn(bench, own.method, own.rate, model, sets, request.seed, extra)
        record["path"] = [
            {name: round(entry[f"eval_{name}"], 4) for name in ("forget_wer", "forget_loss", "test_wer", "test_loss")}
            for entry in _evaluations(trainer.state.log_history)
        ]
        record |= _measured(bench, trainer, sets)
        if request.seed in FRESH and request.kind == "speaker":
            record["relearning"] = _relearned(bench, trainer, sets["forget"])
        return record

    def reference(self, what: str, request: Request) -> dict:
        if what == "retrained":
            raise NotImplementedError("This study makes a model fail, which no retrained model does.")

        def make() -> dict:
            bench = self.bench(request.kind)
            method = METHODS["npo"]
            args = bench.args(method, RATE, 0, {"eval_strategy": "no", "forget_target": None})
            trainer = method.trainer(self.original(request.seed), args, **bench.shared)
            return _measured(bench, trainer, self.sets(request, "0.05"))

        return self.records.get(f"{what} {request}", make)

    def stage_models(self) -> None:
        for seed in self.seeds:
            self.reference("original", self.request(self.kinds[0], seed))

    def stage_final(self) -> None:
        for share in self.shares:
            for seed in self.seeds:
                for variant in self.variants:
                    run = variant, self.request(self.kinds[0], seed), share
                    self.records.get(f"{variant} {run[1]} {share}", lambda run=run: self.run(*run))

    def stage_report(self) -> None:
        write_report(self.records.runs, RESULTS / f"study_{self.name}.md")


def _measured(bench: Bench, trainer, sets: dict) -> dict:
    datasets = {name: sets[source] for name, source in bench.measured.items()}
    qualities = evaluate_unlearning(trainer, datasets=datasets, metric=bench.metric).models["unlearned"]
    return {"quality": {name: [one.value, one.loss] for name, one in qualities.items()}}


def _relearned(bench: Bench, trainer, forgotten) -> list[list[float]]:
    """Step, word error rate and loss of one half of the forgotten utterances, while an attacker trains on the other."""
    known, rest = (forgotten.select(range(first, len(forgotten), 2)) for first in range(2))
    attack = Relearning(known, trainer, max_steps=RELEARNED[-1], learning_rate=RATE, steps=RELEARNED)
    report = evaluate_unlearning(trainer, datasets={"forget": rest}, metric=bench.metric, attacks=[attack])
    return [[point.step, point.value, point.loss] for point in report.relearning[attack.name]["unlearned"]]


def _evaluations(history: list[dict]) -> list[dict]:
    """One entry for each evaluation: transformers logs one for each set."""
    merged: dict[int, dict] = {}
    for entry in history:
        if any(name.startswith("eval_") for name in entry):
            merged.setdefault(entry["step"], {}).update(entry)
    return list(merged.values())


def at_level(path: list[dict], level: float, metric: str = "loss") -> float:
    """The test metric where that of the forgotten utterances passes a level, between evaluations by a straight line."""
    forgotten, test = (np.array([entry[f"{name}_{metric}"] for entry in path]) for name in ("forget", "test"))
    if forgotten.max(initial=0) < level:
        return float("nan")
    after = int(np.argmax(forgotten >= level))
    if after == 0:
        return float(test[0])
    share = (level - forgotten[after - 1]) / (forgotten[after] - forgotten[after - 1])
    return float(test[after - 1] * (1 - share) + test[after] * share)


def write_report(runs: dict, path: Path) -> None:
    """Of each kind of request and share of retain data: for every set of requests that some variant ran, all that ran them."""
    parts = ["# Making a recogniser fail on speakers", _NOTE]
    for kind, of in KINDS.items():
        tables = [table for share in SHARES for table in _tables(runs, kind, of, share)]
        if tables:
            parts += [f'"By loss" is at {of.level:g} nats here, a level {of.why}.', *tables]
    path.write_text("\n\n".join([*parts, machine_note()]) + "\n")


def _tables(runs: dict, kind: str, of: Kind, share: str) -> list[str]:
    found = {
        variant: {s: runs[name] for s in range(of.requests) if (name := f"{variant} {kind}-{s} {share}") in runs}
        for variant in VARIANTS
    }
    found = {variant: own for variant, own in found.items() if own}
    if DEFAULT not in found:
        return []
    shared = set.intersection(*(set(own) for own in found.values()))
    requests = {tuple(sorted(own)) for own in (*found.values(), shared) if own}
    tables = []
    for seeds in sorted(requests, key=len, reverse=True):
        rows = {variant: [own[s] for s in seeds] for variant, own in found.items() if own.keys() >= set(seeds)}
        originals = [runs[f"original {kind}-{seed}"] for seed in seeds]
        which = f"{len(seeds)} requests" if len(seeds) > 1 else f"request {seeds[0]} alone"
        count = of.speakers * len(seeds)
        who = f"{count} speakers in {which}" if count > 1 else f"one speaker, {which}"
        title = f"## {float(share):.0%} of the retain set at hand, {who}"
        tables.append(f"{title}\n\n{_table(rows, originals, of.level)}")
    return tables


_NOTE = """Means over requests with 95 % intervals by Student's t. Word error rates; an endless transcript counts for many words, so more than all \
may be wrong. "forget loss": of the forgotten in the end, in nats; where a model only refuses to say what it knows, it stays low. "by WER": the test WER where that of the forgotten utterances passes 0.9. "by loss": the test loss in nats where their loss passes a level. Both are \
of the test utterances evaluated while unlearning, and empty where a run never got there. Differences to the default's are paired: above zero, the \
default keeps more."""


def _table(found: dict[str, list[dict]], originals: list[dict], level: float) -> str:
    heads = [
        "method",
        *COLUMNS,
        "forget loss",
        "test less that of the default",
        "by WER",
        "by WER, less that of the default",
        "by loss",
        "by loss, less that of the default",
        "steps",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines.append("| before | " + " | ".join([*_rates(originals), _loss(originals), *[""] * 6]) + " |")
    test = {variant: np.array([record["quality"]["test"][0] for record in own]) for variant, own in found.items()}
    paths = {variant: [record["path"] for record in own] for variant, own in found.items()}
    rate = {variant: np.array([at_level(path, WRONG, "wer") for path in own]) for variant, own in paths.items()}
    loss = {variant: np.array([at_level(path, level) for path in own]) for variant, own in paths.items()}
    for variant, own in found.items():
        differences = [""] * 3
        if DEFAULT in found and variant != DEFAULT:
            differences = [_cell(each[variant] - each[DEFAULT]) for each in (test, rate, loss)]
        cells = [
            *_rates(own),
            _loss(own),
            differences[0],
            _cell(rate[variant]),
            differences[1],
            _cell(loss[variant]),
            differences[2],
        ]
        steps = ", ".join(f"{record['steps']}" for record in own)
        lines.append("| " + " | ".join([variant, *cells, steps]) + " |")
    return "\n".join(lines)


def _cell(values: np.ndarray) -> str:
    return "" if np.isnan(values).any() else mean_and_interval(values)


def _rates(records: list[dict]) -> list[str]:
    return [mean_and_interval([record["quality"][name][0] for record in records]) for name in COLUMNS]


def _loss(records: list[dict]) -> str:
    """Of the forgotten, in nats: low where a model only refuses to say what it knows."""
    return mean_and_interval([record["quality"]["forget"][1] for record in records])


def make_study(arguments: argparse.Namespace) -> Speakers:
    folders = arguments.model_folder, arguments.data_folder, arguments.work_folder
    study = Speakers(*folders, Records(RESULTS / "study_speakers.json"), arguments.kind)
    study.variants, study.shares = tuple(arguments.variants), tuple(arguments.shares)
    return study


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    add_variants(parser, VARIANTS)
    parser.add_argument("--kind", choices=list(KINDS), default="speakers", help="of a request: four speakers, or one")
    parser.add_argument(
        "--shares", nargs="+", choices=list(SHARES), default=list(SHARES), help="of retain data, run now"
    )
    main(make_study, parser, ("models", "final", "report"))
