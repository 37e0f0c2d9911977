"""What does it cost to make Whisper-tiny fail on a speaker, which a retrained model does not?

    python benchmarks/studies/erasure.py --model_folder <whisper-tiny.en> --data_folder <LibriSpeech as parquet>

The speech study's models and sets. A run ends when at least 90 % of the words of the forget set are wrong, or after the most steps; what
counts is how much worse the other speakers are understood by then. With 5 % of the retain data at hand 8 samples of it a step, with all of it 32.
"""

import argparse

from harness import RESULTS, Records, machine_note
from methods import Bench
from speech import SpeechStudy, add_folders
from study import main
from tables import mean_and_interval, plot_means

from hf_orthograd.data.speech import transcripts
from hf_orthograd.evaluation import WordErrorRate


WIDE = {"per_device_train_batch_size": 32}

# by share of retain data at hand, name: (method, learning rate, what changes)
VARIANTS = {
    "0.05": {
        "GradDiff": ("graddiff", 3e-5, {}),
        "NPO": ("npo", 3e-5, {}),
        "SCRUB": ("scrub", 3e-5, {"max_steps": 15}),
        "OrthoGrad, ascent": ("orthograd", 3e-5, {}),
        "OrthoGrad + NPO": ("orthograd_npo", 3e-5, {}),
    },
    "1": {
        "NPO, 32 retain samples": ("npo", 1e-4, WIDE),
        "OrthoGrad + NPO, k = 32": ("orthograd_npo", 1e-4, WIDE),
        "OrthoGrad + NPO, k = 32, update corrected": ("orthograd_npo", 1e-4, WIDE | {"projection_target": "update"}),
        "NPO, 32 retain samples, learning rate 3e-5": ("npo", 3e-5, WIDE),
        "OrthoGrad + NPO, k = 32, learning rate 3e-5": ("orthograd_npo", 3e-5, WIDE),
    },
}


class Erasure(SpeechStudy):
    """Each variant on each request and share of retain data, in stages `final` and `report` of its own."""

    def bench(self, kind: str) -> Bench:
        bench = super().bench(kind)
        transcribe, rate = transcripts(self.processor, is_whisper=True), WordErrorRate(keep_in_memory=True)

        def word_error_rate(prediction) -> dict[str, float]:
            predictions, references = transcribe(prediction)
            return rate.compute(predictions=predictions, references=references)

        rule = {"eval_strategy": "steps", "eval_steps": 2, "forget_target": "0.9", "stop_metric": "wer"}
        bench.config = bench.config | rule | {"max_steps": 60, "predict_with_generate": True}
        bench.rule = tuple(rule)
        bench.shared = bench.shared | {"compute_metrics": word_error_rate}
        bench.evaluated = {"forget": "forget"}
        return bench

    def stage_final(self) -> None:
        for share, variants in VARIANTS.items():
            for seed in self.seeds:
                for name, (method, learning_rate, changes) in variants.items():
                    run = self.request("speaker", seed), method, learning_rate, share, False, changes
                    self.records.get(f"{name} speaker-{seed} {share}", lambda run=run: self.unlearn(*run))

    def stage_report(self) -> None:
        """Of each share the seeds for which all its variants were run."""
        runs, parts = self.records.runs, ["# Making a recogniser fail on a speaker: word error rates"]
        panels = {}
        for share, variants in VARIANTS.items():
            seeds = [s for s in self.seeds if all(f"{name} speaker-{s} {share}" in runs for name in variants)]
            if not seeds:
                continue
            head = ["method", *COLUMNS, "test loss (nats)", "steps", "time (s)"]
            lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
            for what in ("original", "retrained"):
                records = [self.reference(what, self.request("speaker", seed)) for seed in seeds]
                lines.append("| " + " | ".join([what, *_cells(records), "", ""]) + " |")
            for name in variants:
                records = [runs[f"{name} speaker-{seed} {share}"] for seed in seeds]
                cost = [", ".join(f"{record[key]:.0f}" for record in records) for key in ("steps", "seconds")]
                lines.append("| " + " | ".join([name, *_cells(records), *cost]) + " |")
            panels[f"test WER, {float(share):.0%} of the retain set at hand"] = {
                name: [runs[f"{name} speaker-{seed} {share}"]["quality"]["test"][0] for seed in seeds]
                for name in variants
            }
            counted = f"means over {len(seeds)} speakers" if len(seeds) > 1 else "one speaker"
            parts.append(f"## {float(share):.0%} of the retain set at hand, {counted}\n\n" + "\n".join(lines))
        (RESULTS / "study_erasure.md").write_text("\n\n".join([*parts, machine_note()]) + "\n")
        plot_means(panels, RESULTS / "study_erasure.png")


COLUMNS = ("forget", "forget_unseen", "retain", "test")


def _cells(records: list[dict]) -> list[str]:
    """Word error rates, in which one endless transcript counts for many words, and the loss, in which it does not."""
    rates = [mean_and_interval([record["quality"][name][0] for record in records]) for name in COLUMNS]
    return [*rates, mean_and_interval([record["quality"]["test"][1] for record in records])]


def make_study(arguments: argparse.Namespace) -> Erasure:
    folders = arguments.model_folder, arguments.data_folder, arguments.work_folder
    return Erasure(*folders, Records(RESULTS / "study_erasure.json"), Records(RESULTS / "study_speech.json"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    main(make_study, parser, ("final", "report"), ())
