"""Five people are to be forgotten in turn by a small chat model: do earlier ones come back, and when it is trained on?

    PYTHONPATH=examples python benchmarks/studies/text_sequences.py

A Llama of 0.8 M parameters learns questions on 21 invented people; each of three seeds invents others, and forgets five of them, one in each
request, with two of five wordings of each question on the others at hand. As in the study of images each run starts from the model that the request before
left. Then the last model learns three new people together with the questions at hand, alone and with the first one to be forgotten among
them. All methods have the same learning rate. Resumable.
"""

import argparse
from functools import cache
from pathlib import Path

import transformers
from datasets import Dataset, concatenate_datasets
from demo_people import make_model, make_people, make_tokenizer
from harness import RESULTS, Records, trained_model
from image_data import Request
from methods import Bench
from retention import KL
from sequences import HOW, ONCE, RETRAINING, Further, SequenceStudy, Variant
from study import add_variants, main
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.data import prepare_text_dataset
from hf_orthograd.evaluation import membership_inference
from hf_orthograd.evaluation.measure import measure
from hf_orthograd.evaluation.text import ExactAnswers, answer_scores
from hf_orthograd.requests import StaysForgotten


REQUESTS, NEW = 5, 3  # people to forget, and those whom the original never read of
LEARNED_FOR, EPOCHS = 30, 10
FURTHER_RATE = 3e-4
RATE = 1e-4
STEPS = 60  # of a request; all at once may take as many for each
AT_HAND = (0, 3)  # of every five questions on the others
CHANCE = 1 / 16  # an attribute has sixteen values
OURS = "OrthoGrad + NPO, kl, to the original"
ORIGINAL = {"extra": KL, "to_original": True}
VARIANTS = {
    ONCE: Variant("orthograd_npo", RATE, KL | {"max_steps": REQUESTS * STEPS}),
    OURS: Variant("orthograd_npo", RATE, **ORIGINAL),
    "OrthoGrad + NPO, kl": Variant("orthograd_npo", RATE, KL),
    "OrthoGrad + NPO, kl, earlier held": Variant("orthograd_npo", RATE, KL, held=True),
    "OrthoGrad + NPO": Variant("orthograd_npo", RATE),
    "NPO, kl, to the original": Variant("npo", RATE, **ORIGINAL),
    "NPO": Variant("npo", RATE),
    "ONPO": Variant("onpo", RATE),
    "ONPO, kl, to the original": Variant("onpo", RATE, **ORIGINAL),
    "GradDiff": Variant("graddiff", RATE),
    RETRAINING: Variant("retraining", None),
}


class TextSequences(SequenceStudy):
    """The study of images with people in place of sets of images."""

    name, kinds = "text_sequences", ("turn",)
    choices, ours, variants = VARIANTS, OURS, tuple(VARIANTS)
    trained_on = (ONCE, OURS, "NPO")
    what, metric = "people", "answers right"
    note = f""""kl" holds answers at hand to the predictions of the model before, "to the original" to those of the model before any request. Learning rate {RATE:g}, and 2e-3 for training. \
Shares of answers that are right in every token, after the last request; test questions are on the others, in words that were not trained on. A run ends when no more \
answers are right than by chance, {CHANCE:.3f}. Retraining is by another seed than the model that gaps are to, and its time is without evaluations. The gap is the mean distance to the model retrained without all five over these shares on forgotten, retained and test \
questions and the AUC of membership inference, against questions on people whom no model read of. "Came back": share on the first person after the last request less that after the first. Means over seeds with 95 % intervals by \
Student's t; differences are paired."""
    continued_note = f"""{EPOCHS} epochs at a learning rate of {FURTHER_RATE:g} on questions on {NEW} new people and those at hand ("new"), and on these with the first request's among \
them. By how much the share of right answers on those rises, watched only and held by `StaysForgotten`, and the share on the new people's, in words that were \
not trained on; also after twice the epochs."""
    task = "new"
    how = HOW | {"watched, twice as long": Further(False, 2), "held, twice as long": Further(True, 2)}

    def __init__(self, work_folder: Path, records: Records):
        self.work = work_folder
        self.records = self.references = records

    def request(self, kind: str, seed: int) -> Request:
        return Request(kind, seed)

    def bench(self, kind: str) -> Bench:
        rule = {
            "eval_strategy": "steps",
            "eval_steps": 2,
            "forget_target": CHANCE,
            "stop_metric": "exact_answers",
            "stop_greater_is_better": True,
        }
        config = {
            "output_dir": str(self.work / "run"),
            "max_steps": STEPS,
            "per_device_train_batch_size": 40,
            "per_device_forget_batch_size": 20,
            "per_device_eval_batch_size": 64,
        }
        # any seed's tokenizer pads as the others do
        shared = {
            "data_collator": DataCollatorForSeq2Seq(_people(0)[1]),
            "compute_metrics": _exact_answers,
            "preprocess_logits_for_metrics": answer_scores,
        }
        return Bench(config | rule, tuple(rule), shared, None, {}, {})

    def of(self, seed: int, split: str, people: slice) -> Dataset:
        """The questions on those of the people, by their names, whom the slice takes."""
        names, _, rows = _people(seed)
        wanted = set(names[people])
        kept = rows[split].select([row for row, name in enumerate(rows[split]["person"]) if name in wanted])
        return kept.remove_columns("person")

    def parts(self, request: Request) -> list[Dataset]:
        return [self.of(request.seed, "train", slice(number, number + 1)) for number in range(REQUESTS)]

    def sets(self, request: Request, retain: str) -> dict:
        others = self.of(request.seed, "train", slice(REQUESTS, -NEW))
        at_hand = [row for row in range(len(others)) if row % 5 in AT_HAND]
        rest = [row for row in range(len(others)) if row % 5 not in AT_HAND]
        return {
            "forget": self.of(request.seed, "train", slice(REQUESTS)),
            "others": others,
            "retain": others.select(at_hand),
            "retain_measured": others.select(rest),
            "new": self.of(request.seed, "train", slice(-NEW, None)),
            "new_asked": self.of(request.seed, "test", slice(-NEW, None)),
            "test": self.of(request.seed, "test", slice(REQUESTS, -NEW)),
        }

    def at_hand(self, retain: Dataset, earlier: list[Dataset], varied: bool) -> Dataset:
        return concatenate_datasets([retain, *earlier])

    def original(self, seed: int):
        return self.learned(seed, self.of(seed, "train", slice(-NEW)), f"original-{seed}")

    def retrained(self, request: Request):
        return self.learned(request.seed, self.sets(request, "")["others"], f"retrained-{request.seed}")

    def learned(self, seed: int, rows: Dataset, name: str):
        return trained_model(
            self.work / name,
            lambda: self.untrained(Request("turn", seed), seed),
            lambda model: self.learn_rows(model, seed, seed, rows),
            AutoModelForCausalLM.from_pretrained,
        )

    def untrained(self, request: Request, seed: int):
        transformers.set_seed(seed)
        return make_model(_people(request.seed)[1])

    def learn(self, model, request: Request, seed: int, number: int) -> int:
        return self.learn_rows(model, request.seed, seed, self.of(request.seed, "train", slice(number, -NEW)))

    def learn_rows(self, model, people: int, seed: int, rows: Dataset) -> int:
        """Trains the model, and returns in how many steps."""
        args = TrainingArguments(
            str(self.work / "training"), num_train_epochs=LEARNED_FOR, per_device_train_batch_size=60, learning_rate=2e-3,
            warmup_steps=0.1, save_strategy="no", report_to="none", disable_tqdm=True, seed=seed,
        )  # fmt: skip
        collate = DataCollatorForSeq2Seq(_people(people)[1])
        return Trainer(model, args, train_dataset=rows, data_collator=collate).train().global_step

    def train_on(self, model, request: Request, again: bool, further: Further) -> None:
        sets, parts = self.sets(request, ""), self.parts(request)
        collate = self.bench(request.kind).shared["data_collator"]
        transformers.set_seed(request.seed)
        args = TrainingArguments(
            str(self.work / "continued"), num_train_epochs=further.times * EPOCHS, per_device_train_batch_size=20, learning_rate=FURTHER_RATE,
            save_strategy="no", report_to="none", disable_tqdm=True, seed=request.seed, logging_steps=1000,
        )  # fmt: skip
        stays = StaysForgotten(sets["forget"], collate, hold=further.hold, batch_size=20)
        new = [sets["new"], sets["retain"], *parts[: 1 if again else 0]]
        Trainer(model, args, train_dataset=concatenate_datasets(new), data_collator=collate, callbacks=[stays]).train()

    def measured(self, model, request: Request) -> dict:
        """Share of right answers and loss on each person's questions and the other sets, and the AUC of forgotten questions against those on new people."""
        sets = self.sets(request, "")
        named = {
            "forget": sets["forget"],
            "retain": sets["retain_measured"],
            "test": sets["test"],
            "new": sets["new_asked"],
        }
        named |= {f"request {number}": part for number, part in enumerate(self.parts(request), start=1)}
        args = OrthoGradConfig(
            str(self.work / "run"), report_to="none", disable_tqdm=True, per_device_eval_batch_size=64
        )
        trainer = OrthoGradTrainer(model, args, **self.bench(request.kind).shared)
        found = {name: measure(trainer, rows, [ExactAnswers()]) for name, rows in named.items()}
        unread = measure(trainer, sets["new"]).losses
        quality = {
            name: [float(one.counts[ExactAnswers.name][0].mean()), float(one.losses.mean())]
            for name, one in found.items()
        }
        return {
            "quality": quality,
            "auc": {"test": membership_inference(found["forget"].losses, unread).auc},
        }


@cache
def _people(seed: int):
    """Names, the tokenizer, and the rows of each split as the model takes them, with their names."""
    corpus = make_people(seed)
    tokenizer = make_tokenizer(corpus)
    columns = {"prompt_column": "question", "answer_column": "answer"}
    rows = {split: prepare_text_dataset(own, tokenizer, **columns) for split, own in corpus.items()}
    return sorted(set(corpus["train"]["person"])), tokenizer, rows


def _exact_answers(prediction) -> dict[str, float]:
    return {"exact_answers": float(ExactAnswers().counts(prediction)[0].mean())}


def make_study(arguments: argparse.Namespace) -> TextSequences:
    study = TextSequences(arguments.work_folder, Records(RESULTS / "study_text_sequences.json"))
    study.variants = tuple(arguments.variants)
    return study


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_folder", type=Path, default=Path("out/studies/people"), help="for trained models")
    add_variants(parser, VARIANTS)
    main(make_study, parser, ("final", "report"), ())
