"""What the tables of recognisers that fail on speakers rest on."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from test_studies import RESULTS, numbers_of


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "studies"))

import speakers
from tables import mean_and_interval


def test_table_of_erased_speakers_is_that_of_its_records(tmp_path):
    runs = json.loads((RESULTS / "study_speakers.json").read_text())["runs"]
    speakers.write_report(runs, tmp_path / "table.md")
    assert numbers_of(tmp_path / "table.md") == numbers_of(RESULTS / "study_speakers.md")


ERASED = {
    "all, three speakers": ("", (0, 1, 2)),
    "the encoder, the same three": (", encoder alone", (0, 1, 2)),
    "all, the first two": ("", (0, 1)),
    "all, utterances at hand varied, the first two": (", varied", (0, 1)),
}


@pytest.mark.parametrize("label", ERASED)
def test_erased_speakers_in_the_docs_are_those_of_the_records(label):
    runs = json.loads((RESULTS / "study_speakers.json").read_text())["runs"]
    page = (RESULTS.parent.parent / "docs" / "results.md").read_text().replace("**", "")
    which, seeds = ERASED[label]
    columns = [[], [], []]
    for method in ("OrthoGrad + NPO, kl", "NPO, kl"):
        found = [runs.get(f"{method}{which} speaker-{seed} 0.05") for seed in seeds]
        if None in found:
            numbers = [float("nan")] * 3
        else:
            ends = [run["quality"]["test"][0] for run in found]
            wrong = [speakers.at_level(run["path"], speakers.WRONG, "wer") for run in found]
            lost = [speakers.at_level(run["path"], speakers.KINDS["speaker"].level) for run in found]
            numbers = [np.mean(ends), np.mean(wrong), np.mean(lost)]
        for column, number, form in zip(columns, numbers, ("{:.0%}", "{:.0%}", "{:.2f}"), strict=True):
            column.append("" if np.isnan(number) else form.format(number).replace("%", " %"))
    cells = " | ".join(cell for column in columns for cell in column)
    assert f"| {label} | {cells} |".replace("|  |", "| |").replace("|  |", "| |") in page


def test_what_the_docs_say_of_the_encoder_alone_is_in_the_records():
    runs = json.loads((RESULTS / "study_speakers.json").read_text())["runs"]
    page = (RESULTS.parent.parent / "docs" / "results.md").read_text()

    def both(variant):
        """The others' test WER, in points: in the end, and where 90 % of the words are wrong."""
        found = [runs[f"{variant} speaker-{seed} 0.05"] for seed in range(3)]
        ends = [run["quality"]["test"][0] for run in found]
        return [100 * np.array(own) for own in (ends, [speakers.at_level(run["path"], 0.9, "wer") for run in found])]

    ours, npo = (both(f"{method}, kl, encoder alone") for method in ("OrthoGrad + NPO", "NPO"))
    whole = ours[1] - both("OrthoGrad + NPO, kl")[1]
    assert (whole < 0).all() and f"({points(whole)} points)" in page
    (end, of_end), (wrong, of_wrong) = (points(b - a, 1).split(" ± ") for a, b in zip(ours, npo, strict=True))
    assert f"{end} points lower in the end, ± {of_end}, and {wrong} where 90 % are wrong, ± {of_wrong}." in page


def points(values, digits=0):
    mean, interval = map(float, mean_and_interval(values).split(" ± "))
    return f"{mean:.{digits}f} ± {interval:.{digits}f}"
