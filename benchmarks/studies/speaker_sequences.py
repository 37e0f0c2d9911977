"""Five speakers withdraw their consent in turn: do earlier ones come back to a recogniser, and when it is trained on?

    python benchmarks/studies/speaker_sequences.py --model_folder <whisper-tiny.en> --data_folder <LibriSpeech as parquet>

One whisper-tiny.en is fine-tuned on utterances of at most 8 s of 28 speakers; each of three seeds forgets five others of them, one in each
request, with a fifth of the other speakers' utterances at hand. As in the study of images each run starts from the model that the request before left. Then the last model is
trained for two epochs on new utterances of the others, alone and with the first speaker's among them. The same learning rate for all. Resumable.
"""

import argparse
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from harness import RESULTS, Records
from methods import Bench
from retention import KL
from sequences import ONCE, SequenceStudy, Variant
from speech import SpeechStudy, add_folders
from speech_data import Request, collator, train_on
from study import main
from transformers import Trainer, TrainingArguments, set_seed

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.evaluation import evaluate_unlearning
from hf_orthograd.requests import StaysForgotten


OURS = "OrthoGrad + NPO, kl, to the original"
RATE = 3e-5
LEAST = 5  # utterances of a speaker who is forgotten
AT_HAND = 5  # every fifth of the others' training utterances
VARIANTS = {
    ONCE: Variant("orthograd_npo", RATE, KL),
    OURS: Variant("orthograd_npo", RATE, KL, to_original=True),
    "NPO, kl, to the original": Variant("npo", RATE, KL, to_original=True),
    "OrthoGrad + NPO": Variant("orthograd_npo", RATE),
    "OrthoGrad + NPO, kl": Variant("orthograd_npo", RATE, KL),
    "OrthoGrad + NPO, kl, to the original, earlier held": Variant(
        "orthograd_npo", RATE, KL, held=True, to_original=True
    ),
    "NPO": Variant("npo", RATE),
    "GradDiff": Variant("graddiff", RATE),
}


class SpeakerSequences(SequenceStudy):
    """The study of images with speakers in place of sets of images; models and measures are those of the study of speech."""

    name, kinds, better = "speaker_sequences", ("turn",), -1
    choices, ours, variants = VARIANTS, OURS, tuple(VARIANTS)
    what = "speakers"
    note = f""""kl" holds utterances at hand to the predictions of the model before, "to the original" to those of the model before any request. Learning rate {RATE:g}. \
Word error rates after the last request. The gap is the mean distance to the model retrained without all five over word error rates on forgotten, retained and test \
utterances and the AUC of membership inference. "Came back": word error rate on the first speaker after the last request less that after the first. Means over seeds with \
95 % intervals by Student's t; differences are paired."""
    continued_note = """2 epochs on new utterances of the others ("new"), and on these with the first speaker's among them. By how much the word error rate on those \
changes, watched only and held by `StaysForgotten`, and the word error rate on test utterances, which stands for the new task."""

    def __init__(self, model_folder: Path, data_folder: Path, work_folder: Path, records: Records):
        self.speech = SpeechStudy(model_folder, data_folder, work_folder, records)
        self.records = self.references = records
        self.corpus, self.work = self.speech.corpus, work_folder

    def request(self, kind: str, seed: int) -> Request:
        return Request(seed, kind)

    def bench(self, kind: str) -> Bench:
        return self.speech.bench(kind)

    def speakers(self, request: Request) -> list[str]:
        names = self.corpus["train"]["speaker"]
        enough = sorted(name for name in set(names) if names.count(name) >= LEAST)
        return enough[request.seed :: len(self.seeds)][:5]

    def parts(self, request: Request) -> list[Dataset]:
        names = self.corpus["train"]["speaker"]
        return [
            self.corpus["train"].select([row for row, name in enumerate(names) if name == speaker])
            for speaker in self.speakers(request)
        ]

    def sets(self, request: Request, retain: str) -> dict:
        """New utterances are the same for all seeds: the original never saw them, whoever is forgotten."""
        gone = set(self.speakers(request))
        rows = {name: [] for name in ("others", "new", "test", "validation")}
        for row, speaker in enumerate(self.corpus["train"]["speaker"]):
            if speaker not in gone:
                rows["new" if self._is_new(row) else "others"].append(row)
        for row, speaker in enumerate(self.corpus["test"]["speaker"]):
            if speaker not in gone:
                rows["validation" if row % 2 else "test"].append(row)
        sets = {
            name: self.corpus["train" if name in ("others", "new") else "test"].select(own)
            for name, own in rows.items()
        }
        at_hand = list(range(0, len(sets["others"]), AT_HAND))
        kept = [row for row in range(len(sets["others"])) if row % AT_HAND]
        return sets | {
            "forget": concatenate_datasets(self.parts(request)),
            "retain": sets["others"].select(at_hand),
            "retain_measured": sets["others"].select(kept[:20]),
        }

    def _is_new(self, row: int) -> bool:
        """Of the speakers with fewer utterances alone, whom no request names."""
        names = self.corpus["train"]["speaker"]
        return names.count(names[row]) < LEAST and row % 2 == 0

    def original(self, seed: int):
        rows = [row for row in range(len(self.corpus["train"])) if not self._is_new(row)]
        return train_on([self.corpus["train"].select(rows)], 0, self.speech.pretrained, self.work, "original-in-turn")

    def retrained(self, request: Request):
        others = self.sets(request, "")["others"]
        name = f"retrained-in-turn-{request.seed}"
        return train_on([others], 0, self.speech.pretrained, self.work, name)

    def at_hand(self, retain: Dataset, earlier: list[Dataset], varied: bool) -> Dataset:
        return concatenate_datasets([retain, *earlier])

    def train_on(self, model, request: Request, again: bool, hold: bool) -> None:
        sets, parts = self.sets(request, ""), self.parts(request)
        collate = collator(self.speech.processor)
        set_seed(request.seed)
        args = TrainingArguments(
            str(self.work / "continued"), num_train_epochs=2, per_device_train_batch_size=8, learning_rate=1e-5,
            save_strategy="no", report_to="none", disable_tqdm=True, seed=request.seed, logging_steps=1000,
        )  # fmt: skip
        stays = StaysForgotten(sets["forget"], collate, hold=hold, batch_size=16)
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
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT", help="run now"
    )
    main(make_study, parser, ("final", "report"), ())
