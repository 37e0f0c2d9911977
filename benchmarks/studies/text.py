"""Which method makes SmolLM2 forget an author as if it had never read of them? TOFU's questions and metrics (arXiv 2401.06121).

    python benchmarks/studies/text.py --model <SmolLM2-135M-Instruct: a folder or a GGUF file> --data_folder <TOFU as JSON lines>

    ... --authors 200 --forgotten 2 --at_hand 20 --asked 40 --eval_batch_size 64  # on a GPU: TOFU whole

SmolLM2-135M learns 20 questions on each of the invented authors; each seed forgets other ones, with a part of the questions on
the rest at hand. A run ends when the mean loss of the forgotten answers has reached that of a model trained without them, or after
the most steps: methods are compared at the same forgetting. Each method's learning rate is the better of two, on one request.
Resumable, and several processes may share the work, each with variants or seeds of its own.
"""

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from harness import RESULTS, Records
from methods import METHODS, Bench
from peft import LoraConfig, get_peft_model
from study import add_variants, main
from text_data import (
    PRECISION,
    QUESTIONS,
    answers_of,
    load_pretrained,
    read_authors,
    read_rows,
    train_on,
    wrong_answers_of,
)
from text_tables import write_report
from transformers import DataCollatorForSeq2Seq

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.baselines import RmuTrainer
from hf_orthograd.evaluation.measure import measure, per_sample_losses
from hf_orthograd.evaluation.text import (
    ExtractionStrength,
    answer_scores,
    choice_probability,
    forget_quality,
    generate_answers,
    model_utility,
    rouge_l,
    truth_ratio,
)
from hf_orthograd.objectives import IGNORED_LABEL


AUTHORS = 8  # by default
EPOCHS = 5
RATES = {"full": (2.5e-5, 5e-5), "lora": (2.5e-4, 5e-4)}
SLOW = {"undial": 2, "rmu": 8}  # to forget: they try so many times the others' rates
RANK = 16
STEPS, EVERY = 40, 2
SIZES = {"per_device_train_batch_size": 8, "per_device_forget_batch_size": 4}
RMU_LAYER = 10  # of 30; with the two before it, as in the paper, a third of the way up
RMU = {"steering": 2.0, "retain_weight": 1.0}  # those of open-unlearning, and not the paper's
NPO_KL = {"retain_loss": "kl"}


@dataclass(frozen=True)
class Variant:
    """A row of the table: a method, what it changes, and whose learning rate it has if not one chosen for itself."""

    method: str
    changes: dict = field(default_factory=dict)
    rate_of: str | None = None


def _with(size: int, **changes) -> dict:
    return {"per_device_train_batch_size": size, **changes}


DEFAULT, SAME_TERM = "OrthoGrad + NPO, kl", "NPO, kl"
VARIANTS = {
    "gradient ascent": Variant("gradient_ascent"),
    "GradDiff": Variant("graddiff"),
    "NPO": Variant("npo"),
    SAME_TERM: Variant("npo", NPO_KL),
    **{f"{SAME_TERM}, k = {k}": Variant("npo", _with(k, **NPO_KL), SAME_TERM) for k in (16, 32, 64)},
    "SimNPO": Variant("simnpo"),
    "UNDIAL": Variant("undial"),
    "RMU": Variant("rmu"),
    "OrthoGrad + NPO": Variant("orthograd_npo"),
    DEFAULT: Variant("orthograd_npo", NPO_KL),
    **{f"{DEFAULT}, k = {k}": Variant("orthograd_npo", _with(k, **NPO_KL), DEFAULT) for k in (16, 32, 64)},
}
SETS = ("retain", "real_authors", "world_facts")  # those whose quality is TOFU's model utility


@dataclass(frozen=True)
class Request:
    """Authors to forget, of those that were learned: by seeds from the last on."""

    seed: int
    forgotten: int
    authors: int

    def __str__(self) -> str:
        return f"request {self.seed}, {self.forgotten} of {self.authors}"


class TextStudy:
    """Each variant on each request, in stages `models`, `tune`, `final` and `report`.

    Args:
        asked (`int`): Most questions of each set that are asked in the end.
        at_hand (`int`): One question of so many on the others is at hand.
    """

    name, seeds, methods = "text", (0, 1, 2), ()
    choices, default = VARIANTS, DEFAULT
    trained = {"full": "All parameters", "lora": f"LoRA of rank {RANK}"}

    def __init__(self, arguments: argparse.Namespace, records: Records):
        self.records, self.pretrained, self.work = records, arguments.model, arguments.work_folder
        self.authors, self.forgotten, self.asked, self.at_hand = (
            getattr(arguments, name) for name in ("authors", "forgotten", "asked", "at_hand")
        )
        self.train, self.variants = arguments.train, tuple(arguments.variants)
        self.evaluation = {"per_device_eval_batch_size": arguments.eval_batch_size, **PRECISION}
        _, self.tokenizer = load_pretrained(arguments.model)
        self.rows = read_authors(arguments.data_folder, self.authors)
        self.general = {}
        for name in SETS[1:]:
            self.general[name] = read_rows(arguments.data_folder, f"{name}_perturbed")[: self.asked]
            for row in self.general[name]:
                row["right_answer"] = row["answer"]

    @property
    def note(self) -> str:
        """What the table says of itself."""
        return f"""SmolLM2-135M-Instruct after {EPOCHS} epochs on {QUESTIONS} questions on each author. One of {self.at_hand} questions on the others is at hand; of the rest \
{self.asked} are asked in the end, as of each other set. bf16 mixed precision. Runs are evaluated every {EVERY} steps, and end when the mean loss of the forgotten answers has reached the retrained model's, \
or after {STEPS} steps: "forget loss" is where they ended. {SIZES["per_device_forget_batch_size"]} forget samples a step and {SIZES["per_device_train_batch_size"]} of those at hand, which is k, where the row says nothing else. \
Each method has the better of two learning rates: that by which, on the first of the requests, the level is reached with others known best; "k" rows have that of their method. \
Rates of UNDIAL are {SLOW["undial"]} times the others', those of RMU, which steers by {RMU["steering"]:g}, {SLOW["rmu"]} times. Forget quality: p-value that truth ratios are those of the retrained model, above 0.05 they are not told apart. Utility: TOFU's, of \
questions on other authors, real authors and world facts. Means over requests with 95 % intervals by Student's t; differences are paired, below zero the default keeps more."""

    def request(self, seed: int) -> Request:
        return Request(seed, self.forgotten, self.authors)

    def split(self, request: Request) -> dict[str, list[dict]]:
        """Rows to forget, at hand, to be asked in the end, to choose a learning rate by, and all others."""
        count = self.forgotten * QUESTIONS
        last = len(self.rows) - request.seed * count
        forgotten = range(last - count, last)
        others = [row for number, row in enumerate(self.rows) if number not in forgotten]
        unseen = [row for number, row in enumerate(others) if number % self.at_hand]
        with_wrong_answers = [row for row in unseen if "perturbed_answer" in row]
        asked = _spread(with_wrong_answers, self.asked)
        chosen = {row["question"] for row in asked}
        return {
            "forget": [self.rows[number] for number in forgotten],
            "at_hand": others[:: self.at_hand],
            "retain": asked,
            "validation": _spread([row for row in unseen if row["question"] not in chosen], 2 * self.asked),
            "others": others,
        }

    def model(self, what: str, request: Request):
        """The model that learned all authors, or all but those to forget."""
        of_all = what == "original"
        name = f"{self.authors}-authors" + ("" if of_all else f"-without-{request.forgotten}-{request.seed}")
        rows = self.rows if of_all else self.split(request)["others"]
        return train_on(rows, self.pretrained, self.tokenizer, self.work / name, EPOCHS)

    def starting_model(self, request: Request):
        """The original, with an adapter where only that is trained."""
        model = self.model("original", request)
        return (
            get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear")) if self.train == "lora" else model
        )

    def trainer(self, model, args: OrthoGradConfig, make: Callable = OrthoGradTrainer, **sources):
        return make(
            model,
            args,
            data_collator=DataCollatorForSeq2Seq(self.tokenizer),
            processing_class=self.tokenizer,
            preprocess_logits_for_metrics=answer_scores,
            **sources,
        )

    def args(self, **changes) -> OrthoGradConfig:
        fixed = {"report_to": "none", "disable_tqdm": True}
        return OrthoGradConfig(str(self.work / "trainer"), **fixed, **self.evaluation, **changes)

    def reference(self, what: str, request: Request) -> dict:
        def make() -> dict:
            trainer = self.trainer(self.model(what, request), self.args())
            return self.measured(trainer, request)

        name = f"{what}, {request}"
        return self.records.get(name, make)

    def measured(self, trainer, request: Request) -> dict:
        """TOFU's numbers, and the truth ratios on the forgotten author that forget quality is made of."""
        rows = self.split(request)
        sets = {"forget": rows["forget"], "retain": rows["retain"], **self.general}
        found = {name: self._measure_set(trainer, own, name in self.general) for name, own in sets.items()}
        forget = answers_of(rows["forget"], self.tokenizer)
        strength = measure(trainer, forget, [ExtractionStrength()])
        return {
            "sets": {name: {key: float(np.mean(own[key])) for key in ("probability", "rouge")} for name, own in found.items()},
            "utility": model_utility([value for name in SETS for value in _skills(found[name])]),
            "truth_ratios": [round(float(ratio), 5) for ratio in found["forget"]["truth_ratio"]],
            "extraction": float(np.mean(strength.counts[ExtractionStrength.name][0])),
            "forget_loss": float(strength.losses.mean()),
        }  # fmt: skip

    def _measure_set(self, trainer, rows: list[dict], is_choice: bool) -> dict[str, np.ndarray]:
        def probabilities(dataset) -> np.ndarray:
            return np.exp(-per_sample_losses(trainer, dataset))  # a loss is the mean over an answer's tokens

        answers = answers_of(rows, self.tokenizer)
        known = right = probabilities(answers)
        if any(row["right_answer"] != row["answer"] for row in rows):
            right = probabilities(answers_of(rows, self.tokenizer, "right_answer"))
        wrong = probabilities(wrong_answers_of(rows, self.tokenizer)).reshape(len(rows), -1)
        longest = max(sum(label != IGNORED_LABEL for label in labels) for labels in answers["labels"])
        said = generate_answers(trainer, answers, max_new_tokens=longest)
        return {
            "probability": choice_probability(known, wrong) if is_choice else known,
            "rouge": rouge_l(said, [row["answer"] for row in rows])[0],
            "truth_ratio": truth_ratio(right, wrong),
        }

    def unlearned(self, variant: str, rate: float, request: Request) -> tuple[OrthoGradTrainer, dict]:
        """A trainer that has unlearned, and what the run took."""
        chosen, rows = VARIANTS[variant], self.split(request)
        method = METHODS[chosen.method]
        forget, at_hand = (answers_of(rows[key], self.tokenizer) for key in ("forget", "at_hand"))
        rule = {
            "eval_strategy": "steps",
            "eval_steps": EVERY,
            "forget_target": self.reference("retrained", request)["forget_loss"],
        }
        settings = {"output_dir": str(self.work / "trainer"), "max_steps": STEPS} | SIZES | self.evaluation
        bench = Bench(settings | rule, tuple(rule), {}, None, {}, {})
        transformers.set_seed(request.seed)
        model = self.starting_model(request)
        args = bench.args(method, rate, request.seed, chosen.changes)
        sources = {"train_dataset": at_hand, "forget_dataset": forget, "eval_dataset": {"forget": forget}}
        trainer = self.trainer(model, args, CLASSES.get(chosen.method, method.trainer), **sources)
        if torch.cuda.is_available():
            gc.collect()  # an earlier run's trainer
            torch.cuda.reset_peak_memory_stats()
        started, failed = time.perf_counter(), None
        try:
            trainer.train()
        except FloatingPointError as error:
            failed = str(error)
        record = {"rate": rate, "steps": trainer.state.global_step, "seconds": time.perf_counter() - started}
        if torch.cuda.is_available():
            record["memory"] = torch.cuda.max_memory_allocated()
        return trainer, record | {"failed": failed}

    def tuned(self, variant: str, rate: float, request: Request) -> dict:
        """How well the forgotten are forgotten and others kept, by losses alone."""
        trainer, record = self.unlearned(variant, rate, request)
        torch.save(trainer.model.state_dict(), self.kept(variant, rate))
        rows = self.split(request)
        losses = {
            name: per_sample_losses(trainer, answers_of(rows[name], self.tokenizer))
            for name in ("forget", "validation")
        }
        return record | {
            "forget_loss": float(losses["forget"].mean()),
            "validation": float(np.exp(-losses["validation"]).mean()),
        }

    def kept(self, variant: str, rate: float) -> Path:
        """Weights of a run that a rate was chosen by: for the first request it is the final run, too."""
        return self.work / f"{variant}, {self.train}, {rate:g}.pt"

    def chosen_rate(self, variant: str) -> float:
        variant = VARIANTS[variant].rate_of or variant
        times = SLOW.get(VARIANTS[variant].method, 1)
        request = self.request(type(self).seeds[0])
        runs = {
            rate: self.records.get(
                f"tune {variant}, {self.train}, {rate:g}, {request}",
                lambda rate=rate: self.tuned(variant, rate, request),
            )
            for rate in (times * rate for rate in RATES[self.train])
        }
        return choose_rate(runs, self.reference("retrained", request)["forget_loss"])

    def run(self, variant: str, request: Request) -> dict:
        rate = self.chosen_rate(variant)
        tuned = self.records.runs.get(f"tune {variant}, {self.train}, {rate:g}, {request}")
        if tuned and self.kept(variant, rate).exists():
            model = self.starting_model(request)
            model.load_state_dict(torch.load(self.kept(variant, rate)))
            trainer = self.trainer(model, self.args())
            record = {key: tuned[key] for key in ("rate", "steps", "seconds", "memory", "failed") if key in tuned}
        else:
            trainer, record = self.unlearned(variant, rate, request)
        record |= self.measured(trainer, request)
        reference = self.reference("retrained", request)
        record["quality"] = forget_quality(np.array(record["truth_ratios"]), np.array(reference["truth_ratios"]))
        return record

    def stage_models(self) -> None:
        for seed in self.seeds:
            for what in ("original", "retrained"):
                self.reference(what, self.request(seed))

    def stage_tune(self) -> None:
        for variant in self.variants:
            self.chosen_rate(variant)

    def stage_final(self) -> None:
        for variant in self.variants:
            for seed in self.seeds:
                run = variant, self.request(seed)
                self.records.get(f"{variant}, {self.train}, {run[1]}", lambda run=run: self.run(*run))

    def stage_report(self) -> None:
        write_report(self, _results_of(self.authors))


def _rmu(model, *args, **kwargs) -> RmuTrainer:
    """With the weights trained that the paper trains: the MLPs of the steered layer and the two before."""
    name = next(name for name, _ in model.named_modules() if name.endswith(f"layers.{RMU_LAYER}"))
    stem = name.removesuffix(str(RMU_LAYER))
    trained = tuple(f"{stem}{number}.mlp." for number in range(RMU_LAYER - 2, RMU_LAYER + 1))
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and key.startswith(trained))
    return RmuTrainer(model, *args, layer=name, **RMU, **kwargs)


CLASSES = {"rmu": _rmu}


def choose_rate(runs: dict[float, dict], target: float) -> float:
    """Of the rates by which the forgotten reach the target, the one that keeps others best; if none does, the one that forgets most.

    The rule that ends a run looks at means over batches, which differ a little from that over samples here.
    """
    whole = {rate: run for rate, run in runs.items() if np.isfinite([run["forget_loss"], run["validation"]]).all()}
    reached = [rate for rate, run in whole.items() if run["forget_loss"] >= 0.97 * target]
    if reached:
        return max(reached, key=lambda rate: whole[rate]["validation"])
    return max(whole, key=lambda rate: whole[rate]["forget_loss"])


def _spread(rows: list[dict], most: int) -> list[dict]:
    """At most so many of them, from all over."""
    return [rows[number * len(rows) // most] for number in range(most)] if len(rows) > most else rows


def _skills(found: dict[str, np.ndarray]) -> list[float]:
    """The three numbers of a set in TOFU's model utility."""
    tells_apart = np.maximum(0, 1 - found["truth_ratio"])
    return [float(np.mean(value)) for value in (found["probability"], found["rouge"], tells_apart)]


def _results_of(authors: int) -> Path:
    """Sizes have files of their own: they come from other machines."""
    return RESULTS / ("study_text" if authors == AUTHORS else f"study_text_{authors}_authors")


def make_study(arguments: argparse.Namespace) -> TextStudy:
    return TextStudy(arguments, Records(_results_of(arguments.authors).with_suffix(".json")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data_folder", type=Path, required=True)
    parser.add_argument("--work_folder", type=Path, default=Path("out/studies/text"), help="for trained models")
    parser.add_argument("--authors", type=int, default=AUTHORS, help="that are learned, from the last on")
    parser.add_argument("--forgotten", type=int, default=1, help="authors")
    parser.add_argument("--asked", type=int, default=20, help="most questions of each set that are asked in the end")
    parser.add_argument("--at_hand", type=int, default=4, help="one question of so many on the others is at hand")
    parser.add_argument("--train", choices=list(RATES), default="full")
    parser.add_argument("--eval_batch_size", type=int, default=16)
    add_variants(parser, VARIANTS)
    main(make_study, parser, ("models", "tune", "final", "report"), ())
