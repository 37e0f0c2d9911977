"""What does it cost to make Whisper-tiny fail on speakers, and does the retain term lower it?

    python benchmarks/studies/speakers.py --model_folder <whisper-tiny.en> --data_folder <LibriSpeech as parquet>

One model is fine-tuned on utterances of at most 13 s of 28 speakers; each of seven seeds forgets four others of them. With `--kind speaker`
utterances last 8 s at most, and each of ten seeds forgets one speaker. A run ends when 90 % of the words of the forgotten utterances are wrong,
of 12 of them at most. NPO has the learning rates of OrthoGrad.

"Encoder alone": the decoder is frozen. "Lower encoder": the upper half of the encoder's layers, too. "Refusal": a full stop is taught as the
answer, which counts as no word. "Four parts": each retain utterance is four rows, held to a part of its tokens each. These were tried after the
rest, on the first five speakers: refusal first by seed 1, the lower half by seeds 0 and 4. Seeds 5 to 9 were run when all that had been chosen;
their models are attacked, too.

Variants are compared by pairs, where 90 % of the words are wrong and where the forgotten utterances' loss has reached a level. Several processes
may work on the same results.
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import concatenate_datasets
from erasure import Erasure
from harness import RESULTS, Records, machine_note
from methods import METHODS, Bench, unlearn
from more_directions import PartCollator, in_parts
from speaker_variants import DEFAULT, KINDS, RATE, REFUSING, SHARES, VARIANTS, WATCHED, WRONG, Kind
from speech import add_folders
from speech_data import Request, load_speech, split, train_on
from study import add_variants, main
from tables import mean_and_interval

from hf_orthograd.data import VarySpeech
from hf_orthograd.evaluation import Relearning, evaluate_unlearning


REFUSAL = "."  # counts as no word; the model's generation suppresses an answer of no token
COLUMNS = ("forget", "forget_unseen", "retain", "test")
FRESH = tuple(range(5, 10))  # speakers on whom nothing was chosen
LOSSES = (1, 2, 4)  # nats a token of the forgotten, at which the others' words are compared
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
        """One run, and of a speaker of [`FRESH`] an attack on its model."""
        own = VARIANTS[variant]
        sets = self.sets(request, share)
        trained = {name: sets[name] for name in ("forget", "retain")}
        if own.parts > 1:  # both sets: they must have the same columns
            start = self.processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
            trained = {
                name: in_parts(rows, own.parts if name == "retain" else 1, start) for name, rows in trained.items()
            }
        if own.varied:
            trained["retain"] = trained["retain"].with_transform(VarySpeech(self.processor.feature_extractor))
        model, bench = self.original(request.seed), self.bench(request.kind)
        bench.shared = bench.shared | {"data_collator": PartCollator(bench.shared["data_collator"])}
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
        trainer, record = unlearn(bench, own.method, own.rate, model, sets | trained, request.seed, extra)
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
    """Step, word error rate and loss of every second forgotten utterance, while an attacker trains on the others."""
    known, rest = (forgotten.select(range(first, len(forgotten), 2)) for first in range(2))
    attack = Relearning(
        known, trainer, max_steps=RELEARNED[-1], learning_rate=RATE, batch_size=len(known), steps=RELEARNED
    )
    report = evaluate_unlearning(trainer, datasets={"forget": rest}, metric=bench.metric, attacks=[attack])
    return [[point.step, point.value, point.loss] for point in report.relearning[attack.name]["unlearned"]]


def _evaluations(history: list[dict]) -> list[dict]:
    """One entry for each evaluation: transformers logs one for each set."""
    merged: dict[int, dict] = {}
    for entry in history:
        if any(name.startswith("eval_") for name in entry):
            merged.setdefault(entry["step"], {}).update(entry)
    return list(merged.values())


def at_level(path: list[dict], level: float, by: str = "loss", what: str = "loss") -> float:
    """A test metric where one of the forgotten utterances passes a level, between evaluations by a straight line."""
    forgotten, test = (np.array([entry[name] for entry in path]) for name in (f"forget_{by}", f"test_{what}"))
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
    if not found:
        return []
    requests = {tuple(sorted(own)) for own in found.values()}
    requests |= {FRESH for own in found.values() if own.keys() >= set(FRESH)}
    tables = []
    for seeds in sorted(requests, key=lambda seeds: (-len(seeds), seeds)):
        rows = {variant: [own[s] for s in seeds] for variant, own in found.items() if own.keys() >= set(seeds)}
        originals = [runs[f"original {kind}-{seed}"] for seed in seeds]
        which = f"{len(seeds)} requests" if len(seeds) > 1 else f"request {seeds[0]} alone"
        if kind == "speaker" and len(seeds) > len(FRESH):
            which += ", five of which served to choose"
        if seeds == FRESH:
            which += ", on which nothing was chosen"
        count = of.speakers * len(seeds)
        who = f"{count} speakers in {which}" if count > 1 else f"one speaker, {which}"
        title = f"## {float(share):.0%} of the retain set at hand, {who}"
        tables.append("\n\n".join([title, _table(rows, originals, of.level), *_further(rows)]))
    return tables


_NOTE = """Means over requests with 95 % intervals by Student's t, which cover the choice of speakers alone: all requests are made to one model. Word \
error rates; an endless transcript counts for many words, so more than all may be wrong. "forget loss": of the forgotten in the end, in nats; where a model only \
refuses to say what it knows, it stays low. "by WER": the test WER where that of the forgotten utterances passes 0.9. "by loss": the test loss in nats where their \
loss passes a level. "Test WER where the forgotten loss is": at levels of which 1 and 2 were set after the runs. These three are of the utterances that are evaluated \
while unlearning, and empty where a run never got there. "Relearning": every second of the forgotten utterances, 3 or 4 of them, while an attacker trains on the \
others. Differences are paired: above zero, the method named in the column's heading keeps more; of relearning, it is brought back further. The last line is of the machine that \
wrote this: "speakers" by "refusal, kl, lower encoder", with the projection and without, and all of 2 to 6 were run on an Intel Xeon, all others on an AMD EPYC."""


def _compared(rows: dict) -> str:
    """The method that the others of a table are compared with."""
    return next((name for name in (DEFAULT, REFUSING) if name in rows), next(iter(rows)))


def _table(found: dict[str, list[dict]], originals: list[dict], level: float) -> str:
    with_which = _compared(found)
    less = f"less that of {with_which}"
    heads = [
        "method",
        *COLUMNS,
        "forget loss",
        f"test {less}",
        "by WER",
        f"by WER, {less}",
        "by loss",
        f"by loss, {less}",
        "steps",
    ]
    lines = [_line(heads), "|---" * len(heads) + "|"]
    lines.append(_line(["before", *_rates(originals), _loss(originals), *[""] * 6]))
    test = {variant: np.array([record["quality"]["test"][0] for record in own]) for variant, own in found.items()}
    rate = {variant: _levels(own, WRONG, "wer", "wer") for variant, own in found.items()}
    loss = {variant: _levels(own, level, "loss", "loss") for variant, own in found.items()}
    for variant, own in found.items():
        differences = [""] * 3
        if variant != with_which:
            differences = [_cell(each[variant] - each[with_which]) for each in (test, rate, loss)]
        cells = [
            *_rates(own),
            _loss(own),
            differences[0],
            _cell(rate[variant]),
            differences[1],
            _cell(loss[variant]),
            differences[2],
        ]
        lines.append(_line([variant, *cells, ", ".join(f"{record['steps']}" for record in own)]))
    return "\n".join(lines)


def _further(found: dict[str, list[dict]]) -> list[str]:
    """The others' WER at the same loss of the forgotten, and what relearning brings back where it was tried."""
    rates = {
        variant: np.array([_levels(own, level, "loss", "wer") for level in LOSSES]) for variant, own in found.items()
    }
    tables = [_with_differences("test WER where the forgotten loss is", [f"{level} nats" for level in LOSSES], rates)]
    attacked = {variant: own for variant, own in found.items() if all("relearning" in record for record in own)}
    if attacked:
        curves = {
            variant: np.array([[rate for _, rate, _ in record["relearning"]] for record in own]).T
            for variant, own in attacked.items()
        }
        steps = [f"{step} steps" for step in (0, *RELEARNED)]
        tables.append(_with_differences("WER of the forgotten, relearning", steps, curves))
    return tables


def _with_differences(corner: str, heads: list[str], values: dict[str, np.ndarray]) -> str:
    """A table of values, shape (columns, requests), each beside its paired difference to the method compared with."""
    with_which = _compared(values)
    heads = [corner, *(cell for head in heads for cell in (head, f"{head}, less that of {with_which}"))]
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for variant, own in values.items():
        less = ["" if variant == with_which else _cell(each) for each in own - values[with_which]]
        lines.append(_line([variant, *(cell for pair in zip(map(_cell, own), less, strict=True) for cell in pair)]))
    return "\n".join(lines)


def _levels(records: list[dict], level: float, by: str, what: str) -> np.ndarray:
    return np.array([at_level(record["path"], level, by, what) for record in records])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


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
