"""Utterances, models and sets of the speech studies: Whisper-tiny.en on the short utterances of 28 speakers."""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset
from harness import trained_model
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer, split_forget_retain
from hf_orthograd.data.speech import SpeechCollator, prepare_speech_dataset, shorten_whisper


SECONDS = 8
EPOCHS = 3
# of all, those with the most utterances of at most 8 s: ways to make a model fail were chosen on the first five
SPEAKERS = ("118", "460", "7367", "7859", "8629", "332", "2136", "1898", "3242", "3526")
GROUPS = 7


@dataclass(frozen=True)
class Request:
    """Whom to forget: one "speaker", another for each seed, or four "speakers", all 28 of them over seven seeds."""

    seed: int
    kind: str = "speaker"

    def speakers(self, everyone: list[str]) -> list[str]:
        if self.kind == "speaker":
            return [SPEAKERS[self.seed % len(SPEAKERS)]]
        return sorted(everyone)[self.seed :: GROUPS]

    def __str__(self) -> str:
        return f"{self.kind}-{self.seed}"


def load_speech(model_folder: Path, data_folder: Path, longest: int = SECONDS):
    """The pretrained model's processor and all utterances of at most `longest` seconds, prepared."""
    _, processor = load_pretrained(model_folder, longest)
    corpus = load_dataset(str(data_folder))
    prepared = {}
    for name, rows in corpus.items():
        short = [row for row, seconds in enumerate(rows["duration"]) if seconds <= longest]
        rows = prepare_speech_dataset(rows.select(short), processor)
        prepared[name] = rows
    return processor, DatasetDict(prepared)


def load_pretrained(folder: Path, window: int = SECONDS):
    """Whisper with a window of so many seconds, and its processor."""
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    if model.config.max_source_positions == 1500:
        shorten_whisper(model, processor, window)
    return model, processor


def split(request: Request, corpus: DatasetDict, retain: str) -> dict:
    """The sets of a run; `retain` is the share of the others' training utterances still at hand.

    Returns:
        "forget", "others", "retain" (at hand), "retain_measured" (30 that are not at hand unless all are), "forget_unseen"
        (the forgotten speakers' test utterances), and of the others' test utterances one half each "validation" and "test".
    """
    by_speaker = {"column": "speaker", "values": request.speakers(corpus["train"].unique("speaker"))}
    train, test = split_forget_retain(corpus["train"], **by_speaker), split_forget_retain(corpus["test"], **by_speaker)
    others, share = train["retain"], float(retain)
    size = len(others) if share == 1 else max(1, round(share * len(others)))
    order = others.shuffle(seed=request.seed)
    return {
        "forget": train["forget"],
        "others": others,
        "retain": order.select(range(size)),
        "retain_measured": order.select(range(len(order) - 30, len(order))),
        "forget_unseen": test["forget"],
        "validation": test["retain"].select(range(1, len(test["retain"]), 2)),
        "test": test["retain"].select(range(0, len(test["retain"]), 2)),
    }


def collator(processor) -> SpeechCollator:
    return SpeechCollator(processor, processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>"))


def train_on(sets: list, seed: int, pretrained: Path, output: Path, name: str, window: int = SECONDS):
    """Whisper fine-tuned on these utterances, from the disk if that has been done before."""

    def build():
        return untrained(seed, pretrained, window)

    def train(model):
        learn(model, concatenate_datasets(sets), seed, load_pretrained(pretrained, window)[1], output)

    def load(folder: Path):
        return AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float32)

    return trained_model(output / name, build, train, load)


def untrained(seed: int, pretrained: Path, window: int = SECONDS):
    """The recogniser as it was published."""
    transformers.set_seed(seed)
    return load_pretrained(pretrained, window)[0]


def learn(model, utterances: Dataset, seed: int, processor, output: Path) -> int:
    """Fine-tunes the model, and returns in how many steps."""
    args = OrthoGradConfig(
        output_dir=str(output / "training"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=8,
        learning_rate=3e-5,
        warmup_steps=0.1,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    trainer = OrthoGradTrainer(
        model, args, train_dataset=utterances, data_collator=collator(processor), processing_class=processor
    )
    return trainer.train().global_step
