"""Five speakers withdraw their consent in turn: do earlier ones come back to a recogniser, and when it is trained on?

    python benchmarks/studies/speaker_sequences.py --model_folder <whisper-tiny.en> --data_folder <LibriSpeech as parquet>

One whisper-tiny.en is fine-tuned on utterances of at most 8 s of 27 speakers; each of three seeds forgets five others of them, one in each
request, with a fifth of the other speakers' utterances at hand. As in the study of images each run starts from the model that the request before
left. Then the last model is trained on new utterances with the first speaker's among them. All methods have the same learning rate. Resumable.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from harness import RESULTS, Records
from methods import Bench
from retention import KL
from sequences import ONCE, RETRAINING, Further, SequenceStudy, Variant
from speech import SpeechStudy, add_folders
from speech_data import Request, collator, learn, train_on, untrained
from study import add_variants, main
from transformers import Trainer, TrainingArguments, set_seed

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.evaluation import evaluate_unlearning
from hf_orthograd.requests import StaysForgotten


OURS = "OrthoGrad + NPO, kl, to the original"
RATE = 1e-5  # at 3e-5 the few utterances of a request are forgotten too far in the first steps
FURTHER_STEPS = 20
LEAST, MOST = 3, 10  # utterances of a speaker who may be forgotten
AT_HAND = 5  # every fifth of the others' training utterances
MEASURED = 20  # of those that are not at hand
VARIANTS = {
    ONCE: Variant("orthograd_npo", RATE, KL),
    OURS: Variant("orthograd_npo", RATE, KL, to_original=True),
    "NPO, kl, to the original": Variant("npo", RATE, KL, to_original=True),
    "OrthoGrad + NPO": Variant("orthograd_npo", RATE),
    "OrthoGrad + NPO, kl": Variant("orthograd_npo", RATE, KL),
    "OrthoGrad + NPO, kl, earlier held": Variant("orthograd_npo", RATE, KL, held=True),
    "NPO": Variant("npo", RATE),
    "ONPO": Variant("onpo", RATE),
    "ONPO, kl, to the original": Variant("onpo", RATE, KL, to_original=True),
    "GradDiff": Variant("graddiff", RATE),
    RETRAINING: Variant("retraining", None),
}


class SpeakerSequences(SequenceStudy):
    """The study of images with speakers in place of sets of images; models and measures are those of the study of speech."""

    name, kinds = "speaker_sequences", ("turn",)
    choices, ours, variants = VARIANTS, OURS, tuple(VARIANTS)
    trained_on, new_data = (OURS,), {"new with request 1": True}  # a run held takes minutes
    what, metric = "speakers", "word error rate"
    note = f""""kl" holds utterances at hand to the predictions of the model before, "to the original" to those of the model before any request. Learning rate {RATE:g}; retraining is as the original's training, by another seed than the model that gaps are to, and its time without evaluations, of two seeds beside other jobs, up to three times too long. \
Word error rates after the last request. The gap is the mean distance to the model retrained without all five over word error rates on forgotten, retained and test \
utterances and the AUC of membership inference. "Came back": word error rate on the first speaker after the last request less that after the first: below zero, it came back. Rates above 1 count as 1 in the gap alone. \
Means over requests, of one original, with 95 % intervals by Student's t; differences are paired."""
    continued_note = f"""{FURTHER_STEPS} steps on 26 new utterances of speakers whom no request names, with the first speaker's among them. By how much the word \
error rate on those changes, watched only and held by `StaysForgotten`, and the word error rate on test utterances, which stands for the new task."""

    def __init__(self, model_folder: Path, data_folder: Path, work_folder: Path, records: Records):
        self.speech = SpeechStudy(model_folder, data_folder, work_folder, records)
        self.records = self.references = records
        self.corpus, self.work = self.speech.corpus, work_folder
        self.names = self.corpus["train"]["speaker"]
        self.named = sorted(name for name, count in Counter(self.names).items() if LEAST <= count <= MOST)
        # of the speakers whom no request names: the original never saw these
        self.new = [row for row, name in enumerate(self.names) if name not in self.named][::2]

    def request(self, kind: str, seed: int) -> Request:
        return Request(seed, kind)

    def bench(self, kind: str) -> Bench:
        """As in the study of speech, but each step is followed by an evaluation: of so few utterances one is much."""
        bench = self.speech.bench(kind)
        bench.config["eval_steps"] = 1
        return bench

    def speakers(self, request: Request) -> list[str]:
        return self.named[request.seed :: len(type(self).seeds)][:5]

    def parts(self, request: Request) -> list[Dataset]:
        return [
            self.corpus["train"].select([row for row, name in enumerate(self.names) if name == speaker])
            for speaker in self.speakers(request)
        ]

    def sets(self, request: Request, retain: str) -> dict:
        gone, new = set(self.speakers(request)), set(self.new)
        others = [row for row, name in enumerate(self.names) if name not in gone and row not in new]
        test = [row for row, name in enumerate(self.corpus["test"]["speaker"]) if name not in gone]
        rest = [row for place, row in enumerate(others) if place % AT_HAND]
        return {
            "forget": concatenate_datasets(self.parts(request)),
            "others": self.corpus["train"].select(others),
            "retain": self.corpus["train"].select(others[::AT_HAND]),
            "retain_measured": self.corpus["train"].select(
                [rest[place] for place in np.linspace(0, len(rest) - 1, MEASURED).astype(int)]
            ),
            "new": self.corpus["train"].select(self.new),
            "test": self.corpus["test"].select(test[::2]),
            "validation": self.corpus["test"].select(test[1::2]),
        }

    def original(self, seed: int):
        new = set(self.new)
        rows = self.corpus["train"].select([row for row in range(len(self.names)) if row not in new])
        return train_on([rows], 0, self.speech.pretrained, self.work, "original-in-turn")

    def retrained(self, request: Request):
        others = self.sets(request, "")["others"]
        name = f"retrained-in-turn-{request.seed}"
        return train_on([others], 0, self.speech.pretrained, self.work, name)

    def untrained(self, request: Request, seed: int):
        return untrained(seed, self.speech.pretrained)

    def learn(self, model, request: Request, seed: int, number: int) -> int:
        rows = concatenate_datasets([self.sets(request, "")["others"], *self.parts(request)[number:]])
        return learn(model, rows, seed, self.speech.processor, self.work)

    def at_hand(self, retain: Dataset, earlier: list[Dataset], varied: bool) -> Dataset:
        if varied:
            raise NotImplementedError("Utterances are not varied here.")
        return concatenate_datasets([retain, *earlier])

    def train_on(self, model, request: Request, again: bool, further: Further) -> None:
        sets, parts = self.sets(request, ""), self.parts(request)
        collate = collator(self.speech.processor)
        set_seed(request.seed)
        args = TrainingArguments(
            str(self.work / "continued"), max_steps=further.times * FURTHER_STEPS, per_device_train_batch_size=8, learning_rate=1e-5,
            save_strategy="no", report_to="none", disable_tqdm=True, seed=request.seed, logging_steps=1000,
        )  # fmt: skip
        stays = StaysForgotten(sets["forget"], collate, hold=further.hold, batch_size=8)
        new = concatenate_datasets([sets["new"], parts[0]]) if again else sets["new"]
        Trainer(model, args, train_dataset=new, data_collator=collate, callbacks=[stays]).train()

    def measured(self, model, request: Request) -> dict:
        """Word error rate and loss on each speaker's utterances and the other sets, and the AUC of forgotten against test utterances."""
        bench, sets = self.bench(request.kind), self.sets(request, "")
        args = OrthoGradConfig(
            str(self.work / "run"), report_to="none", disable_tqdm=True, predict_with_generate=True,
            generation_max_length=80, per_device_eval_batch_size=16,
        )  # fmt: skip
        datasets = {"forget": sets["forget"], "retain": sets["retain_measured"], "test": sets["test"]}
        report = evaluate_unlearning(
            OrthoGradTrainer(model, args, **bench.shared),
            datasets=datasets,
            metric=bench.metric,
            group_column="speaker",
        )
        found = report.models["unlearned"]
        quality = {name: [one.value, one.loss] for name, one in found.items()}
        for number, speaker in enumerate(self.speakers(request), start=1):
            quality[f"request {number}"] = [found["forget"].groups[speaker], None]
        return {"quality": quality, "auc": {"test": report.membership["unlearned"]["test"].auc}}


def make_study(arguments: argparse.Namespace) -> SpeakerSequences:
    folders = arguments.model_folder, arguments.data_folder, arguments.work_folder
    study = SpeakerSequences(*folders, Records(RESULTS / "study_speaker_sequences.json"))
    study.variants = tuple(arguments.variants)
    return study


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    add_variants(parser, VARIANTS)
    main(make_study, parser, ("final", "report"), ())
