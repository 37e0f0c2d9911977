"""Which method makes Whisper-tiny forget a speaker as if it had never heard them?

    python benchmarks/studies/speech.py --model_folder <whisper-tiny.en> --data_folder <LibriSpeech as parquet>
    ... --name speech_kl --seeds 0 1 2 --methods scrub npo_kl orthograd_npo_kl --stages models tune final report

On utterances of at most 8 s, so that it runs on two cores; each seed forgets another speaker. Resumable, as the image study. Every method
has the same steps, batches, stopping rule and two learning rates to choose from, chosen on validation utterances with the first speaker.
The second command is for the retain term "kl", with results of its own: all its models and runs are from one machine.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from harness import RESULTS, Records
from methods import Bench, attacks_of
from speech_data import Request, collator, load_speech, split, train_on
from study import Study, main

from hf_orthograd.data.speech import transcripts
from hf_orthograd.evaluation import WordErrors


MEASURED = {
    "forget": "forget",
    "retain": "retain_measured",
    "test": "test",
    "validation": "validation",
    "forget_unseen": "forget_unseen",
}


class SpeechStudy(Study):
    name, kinds = "speech", ("speaker",)
    grid = (1e-5, 3e-5)
    methods = (
        "orthograd",
        "graddiff",
        "scrub",
        "mean_projection",
        "npo",
        "gradient_ascent",
        "orthograd_npo",
        "npo_kl",
        "orthograd_npo_kl",
    )
    sized = ("graddiff", "scrub", "orthograd_npo")
    sizes = ("0.01", "0.2", "1")
    better = -1

    def __init__(
        self,
        model_folder: Path,
        data_folder: Path,
        work_folder: Path,
        records: Records,
        references: Records | None = None,
    ):
        super().__init__(records, references)
        self.pretrained, self.work = model_folder, work_folder
        self.processor, self.corpus = load_speech(model_folder, data_folder)

    def request(self, kind: str, seed: int) -> Request:
        return Request(seed)

    def bench(self, kind: str) -> Bench:
        """A speaker is forgotten when the loss is that of utterances never trained on."""
        rule = {"eval_strategy": "steps", "eval_steps": 3, "forget_target": "reference"}
        sizes = {"per_device_train_batch_size": 8, "per_device_forget_batch_size": 8, "per_device_eval_batch_size": 16}
        config = {"output_dir": str(self.work / "run"), "max_steps": 15, "generation_max_length": 80, **sizes, **rule}
        return Bench(
            config=config,
            rule=tuple(rule),
            shared={"data_collator": collator(self.processor), "processing_class": self.processor},
            metric=WordErrors(transcripts(self.processor, is_whisper=True)),
            measured=MEASURED,
            evaluated={"reference": "validation"},
            before_measuring={"predict_with_generate": True},
        )

    def sets(self, request: Request, retain: str) -> dict:
        return split(request, self.corpus, retain)

    def original(self, seed: int):
        sets = split(self.request("speaker", seed), self.corpus, "1")
        name = f"original-{seed}"
        return train_on([sets["forget"], sets["others"]], seed, self.pretrained, self.work, name)

    def retrained(self, request: Request):
        sets = split(request, self.corpus, "1")
        return train_on([sets["others"]], request.seed, self.pretrained, self.work, f"retrained-{request}")

    def attacks(self, request: Request, sets: dict) -> Callable:
        """The attacker fine-tunes on the speaker's test utterances, which were never trained on."""
        known = sets["forget_unseen"]
        return attacks_of(known, bits=(4,), max_steps=5, learning_rate=1e-5, batch_size=len(known), steps=(1, 5))


def make_study(arguments: argparse.Namespace) -> SpeechStudy:
    folders = arguments.model_folder, arguments.data_folder, arguments.work_folder
    study = SpeechStudy(*folders, Records(RESULTS / f"study_{arguments.name}.json"))
    study.name = arguments.name
    return study


def add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_folder", type=Path, required=True)
    parser.add_argument("--data_folder", type=Path, required=True)
    parser.add_argument("--work_folder", type=Path, default=Path("out/studies/speech"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    parser.add_argument("--name", default=SpeechStudy.name, help="of the files with the results")
    main(make_study, parser)
