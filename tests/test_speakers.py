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


# what is done by which parameters, on which speakers: with the projection, and without
ERASED = {
    "ascended, all, the first three": ("OrthoGrad + NPO, kl", "NPO, kl", 3),
    "ascended, the encoder": ("OrthoGrad + NPO, kl, encoder alone", "NPO, kl, encoder alone", 5),
    "ascended, the encoder's lower half": ("OrthoGrad + NPO, kl, lower encoder", "NPO, kl, lower encoder", 5),
    "another answer, the encoder": ("OrthoGrad, refusal, kl, encoder alone", "refusal, kl, encoder alone", 5),
    "another answer, the encoder's lower half": (
        "OrthoGrad, refusal, kl, lower encoder",
        "refusal, kl, lower encoder",
        5,
    ),
}


def read():
    runs = json.loads((RESULTS / "study_speakers.json").read_text())["runs"]
    return runs, (RESULTS.parent.parent / "docs" / "results.md").read_text().replace("**", "")


def costs(runs, variant, count):
    """The others' test WER in points, in the end and where 90 % of the words are wrong; None where a speaker was not run."""
    found = [runs.get(f"{variant} speaker-{seed} 0.05") for seed in range(count)]
    if None in found:
        return None
    ends = [run["quality"]["test"][0] for run in found]
    return [100 * np.array(own) for own in (ends, [speakers.at_level(run["path"], 0.9, "wer") for run in found])]


def row_of(runs, label):
    """A row of the table in the docs."""
    ours, other, count = ERASED[label]
    both = [costs(runs, variant, count) for variant in (ours, other)]
    cells = []
    for when in range(2):
        cells += ["" if own is None else f"{own[when].mean():.0f} %" for own in both]
        cells.append("" if None in both else points(both[1][when] - both[0][when]))
    return f"| {label} | {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


@pytest.mark.parametrize("label", ERASED)
def test_erased_speakers_in_the_docs_are_those_of_the_records(label):
    runs, page = read()
    assert row_of(runs, label) in page


def points(values):
    mean, interval = map(float, mean_and_interval(values).split(" ± "))
    return f"{mean:.0f} ± {interval:.0f}"


def test_what_the_docs_say_of_another_answer_is_in_the_records():
    runs, page = read()

    def mean_loss(variant):
        """Of what the forgotten said, in the end, in nats."""
        return np.mean([runs[f"{variant} speaker-{seed} 0.05"]["quality"]["forget"][1] for seed in range(5)])

    low, high = (mean_loss(f"OrthoGrad{how}, kl, encoder alone") for how in (", refusal", " + NPO"))
    assert f"stays low, {low:.1f} nats in place of {high:.1f} by the encoder" in page
    ours, other = (costs(runs, f"{who}refusal, kl, encoder alone", 5) for who in ("OrthoGrad, ", ""))
    assert f"The projection keeps {points(other[0] - ours[0])} points in the end" in page
    retained = [
        100 * np.mean([runs[f"{variant}speaker-{seed}{end}"]["quality"]["retain"][0] for seed in range(5)])
        for variant, end in (("OrthoGrad, refusal, kl, lower encoder ", " 0.05"), ("original ", ""))
    ]
    varied, plain = (costs(runs, f"OrthoGrad + NPO, kl{how}", 2)[0].mean() for how in (", varied", ""))
    assert f"varied for two speakers, all parameters: {varied:.0f} % in the end, in place of {plain:.0f} %." in page
    assert "{:.0f} % of the words are then wrong in the end, {:.1f} % before".format(*retained) in page
