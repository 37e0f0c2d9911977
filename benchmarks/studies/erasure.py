"""What does it cost to make Whisper-tiny fail on a speaker, which a retrained model does not?

    python benchmarks/studies/erasure.py --model_folder <whisper-tiny.en> --data_folder <LibriSpeech as parquet>

The speech study's models and sets. A run ends when at least 90 % of the words of the forget set are wrong, or after the most steps; what
counts is how much worse the other speakers are understood by then. Methods at one learning rate, each with little and with all retain data.
"""

import argparse

from harness import RESULTS, Records, machine_note
from methods import Bench
from speech import SpeechStudy, add_folders
from study import main
from tables import mean_and_interval

from hf_orthograd.evaluation import WordErrorRate
from hf_orthograd.speech import transcripts


LEARNING_RATE = 3e-5
SHARES = ("0.05", "1")

# name: (method, what changes)
VARIANTS = {
    "gradient ascent": ("gradient_ascent", {}),
    "GradDiff": ("graddiff", {}),
    "NPO": ("npo", {}),
    "mean projection": ("mean_projection", {}),
    "SCRUB": ("scrub", {}),
    "OrthoGrad": ("orthograd", {}),
    "OrthoGrad, alpha = 0.8": ("orthograd", {"alpha": 0.8}),
    "OrthoGrad + NPO": ("orthograd_npo", {}),
    "OrthoGrad, update corrected": ("orthograd_update", {}),
}


class Erasure(SpeechStudy):
    """Each variant on each request and share of retain data; `stage_final` and `stage_report` are all there is."""

    def bench(self, kind: str) -> Bench:
        bench = super().bench(kind)
        transcribe, rate = transcripts(self.processor, is_whisper=True), WordErrorRate(keep_in_memory=True)

        def word_error_rate(prediction) -> dict[str, float]:
            predictions, references = transcribe(prediction)
            return rate.compute(predictions=predictions, references=references)

        rule = {"eval_strategy": "steps", "eval_steps": 3, "forget_target": "0.9", "stop_metric": "wer"}
        bench.config = bench.config | rule | {"max_steps": 60, "predict_with_generate": True}
        bench.rule = tuple(rule)
        bench.shared = bench.shared | {"compute_metrics": word_error_rate}
        bench.evaluated = {"forget": "forget"}
        return bench

    def stage_final(self) -> None:
        for seed in self.seeds:
            for share in SHARES:
                for variant in VARIANTS:
                    self.erase(variant, share, seed)

    def erase(self, variant: str, share: str, seed: int) -> dict:
        request, (method, changes) = self.request("speaker", seed), VARIANTS[variant]
        make = lambda: self.unlearn(request, method, LEARNING_RATE, share, attacked=False, extra=changes)  # noqa: E731
        return self.records.get(f"{variant} {request} {share}", make)

    def stage_report(self) -> None:
        """Variants that lack a seed that the first one has are left out."""
        seeds = [s for s in self.seeds if f"{next(iter(VARIANTS))} speaker-{s} {SHARES[0]}" in self.records.runs]
        parts = []
        for share in SHARES:
            lines = ["| method | " + " | ".join([*COLUMNS, "steps", "time (s)"]) + " |"]
            lines.append("|---" * (len(COLUMNS) + 3) + "|")
            for what in ("original", "retrained"):
                records = [self.reference(what, self.request("speaker", seed)) for seed in seeds]
                lines.append("| " + " | ".join([what, *_cells(records), "", ""]) + " |")
            for variant in VARIANTS:
                records = [self.records.runs.get(f"{variant} speaker-{seed} {share}") for seed in seeds]
                if None not in records:
                    cost = [", ".join(f"{record[name]:.0f}" for record in records) for name in ("steps", "seconds")]
                    lines.append("| " + " | ".join([variant, *_cells(records), *cost]) + " |")
            parts.append(f"## {float(share):.0%} of the retain set at hand\n\n" + "\n".join(lines))
        counted = f"means over {len(seeds)} speakers" if len(seeds) > 1 else "one speaker"
        text = f"# Making a recogniser fail on a speaker: word error rates, {counted}\n\n" + "\n\n".join(
            [*parts, machine_note()]
        )
        (RESULTS / "study_erasure.md").write_text(text + "\n")


COLUMNS = ("forget", "forget_unseen", "retain", "test")


def _cells(records: list[dict]) -> list[str]:
    return [mean_and_interval([record["quality"][name][0] for record in records]) for name in COLUMNS]


def make_study(arguments: argparse.Namespace) -> Erasure:
    folders = arguments.model_folder, arguments.data_folder, arguments.work_folder
    return Erasure(*folders, Records(RESULTS / "study_erasure.json"), Records(RESULTS / "study_speech.json"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    main(make_study, parser, ("final", "report"), ())
