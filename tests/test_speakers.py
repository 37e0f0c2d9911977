"""What the tables of recognisers that fail on speakers rest on."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from test_studies import RESULTS, numbers_of


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "studies"))

import speakers
from speakers import FRESH, at_level
from speakers import REFUSING as REFUSES
from tables import mean_and_interval


def test_table_of_erased_speakers_is_that_of_its_records(tmp_path):
    runs = json.loads((RESULTS / "study_speakers.json").read_text())["runs"]
    speakers.write_report(runs, tmp_path / "table.md")
    assert numbers_of(tmp_path / "table.md") == numbers_of(RESULTS / "study_speakers.md")


PLAIN = REFUSES.removeprefix("OrthoGrad, ")
CHOSEN = range(5)  # speakers on whom ways were chosen
# what is done by which parameters: with the projection, without, on which speakers, and the share of others' utterances at hand
ERASED = {
    "ascended, all": ("OrthoGrad + NPO, kl", "NPO, kl", CHOSEN, "0.05"),
    "ascended, the encoder": ("OrthoGrad + NPO, kl, encoder alone", "NPO, kl, encoder alone", CHOSEN, "0.05"),
    "ascended, the encoder's lower half": (
        "OrthoGrad + NPO, kl, lower encoder",
        "NPO, kl, lower encoder",
        CHOSEN,
        "0.05",
    ),
    "another answer, the encoder": (
        "OrthoGrad, refusal, kl, encoder alone",
        "refusal, kl, encoder alone",
        CHOSEN,
        "0.05",
    ),
    "another answer, the encoder's lower half": (REFUSES, PLAIN, CHOSEN, "0.05"),
    "the same, five speakers on whom nothing was chosen": (REFUSES, PLAIN, FRESH, "0.05"),
    "the same, the first three, all others at hand": (REFUSES, PLAIN, range(3), "1"),
}


def read():
    runs = json.loads((RESULTS / "study_speakers.json").read_text())["runs"]
    return runs, (RESULTS.parent.parent / "docs" / "results.md").read_text().replace("**", "")


def found(runs, variant, seeds, share="0.05"):
    """The runs, or None where one is missing."""
    own = [runs.get(f"{variant} speaker-{seed} {share}") for seed in seeds]
    return None if None in own else own


def costs(runs, variant, seeds, share="0.05"):
    """The others' test WER in points, in the end and where 90 % of the words are wrong; None where a speaker was not run."""
    own = found(runs, variant, seeds, share)
    if own is None:
        return None
    ends = [run["quality"]["test"][0] for run in own]
    return [100 * np.array(each) for each in (ends, [at_level(run["path"], 0.9, "wer", "wer") for run in own])]


def row_of(runs, label):
    """A row of the table in the docs."""
    ours, other, seeds, share = ERASED[label]
    both = [costs(runs, variant, seeds, share) for variant in (ours, other)]
    cells = []
    for when in range(2):
        cells += ["" if own is None else f"{own[when].mean():.0f} %" for own in both]
        cells.append("" if None in both else points(both[1][when] - both[0][when]))
    return f"| {label} | {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


@pytest.mark.parametrize("label", ERASED)
def test_erased_speakers_in_the_docs_are_those_of_the_records(label):
    runs, page = read()
    assert row_of(runs, label) in page


def by_loss(runs, label):
    """A row of the table of the others' WER where the loss of the forgotten has reached a level."""
    both = [
        [
            100 * np.array([at_level(run["path"], level, "loss", "wer") for run in found(runs, variant, CHOSEN)])
            for level in (1, 2, 4)
        ]
        for variant in ("OrthoGrad + NPO, kl", "NPO, kl")
    ]
    rows = {
        "OrthoGrad + NPO": [f"{own.mean():.1f} %" for own in both[0]],
        "NPO": [f"{own.mean():.1f} %" for own in both[1]],
    }
    rows["less by the projection"] = [points(other - own, 1) for own, other in zip(*both, strict=True)]
    return f"| {label} | {' | '.join(rows[label])} |"


@pytest.mark.parametrize("label", ["OrthoGrad + NPO", "NPO", "less by the projection"])
def test_the_same_loss_in_the_docs_is_that_of_the_records(label):
    runs, page = read()
    assert by_loss(runs, label) in page


RELEARNED = {
    "another answer, OrthoGrad": REFUSES,
    "another answer, no projection": PLAIN,
}


def relearned(runs, label):
    curves = np.array([[rate for _, rate, _ in run["relearning"]] for run in found(runs, RELEARNED[label], FRESH)])
    return f"| {label} | {' | '.join(f'{100 * rate:.0f} %' for rate in curves.mean(0))} |"


@pytest.mark.parametrize("label", RELEARNED)
def test_relearning_in_the_docs_is_that_of_the_records(label):
    runs, page = read()
    assert relearned(runs, label) in page


def points(values, digits=0):
    mean, interval = map(float, mean_and_interval(values).split(" ± "))
    return f"{mean:.{digits}f} ± {interval:.{digits}f}"


def test_what_the_docs_say_of_another_answer_is_in_the_records():
    runs, page = read()

    def mean(variant, of, metric, share="0.05", seeds=CHOSEN):
        return np.mean([run["quality"][of][metric] for run in found(runs, variant, seeds, share)])

    low, high = (mean(f"OrthoGrad{how}, kl, encoder alone", "forget", 1) for how in (", refusal", " + NPO"))
    assert f"stays low, {low:.1f} nats in place of {high:.1f} by the encoder" in page
    before = 100 * np.mean([runs[f"original speaker-{seed}"]["quality"]["retain"][0] for seed in CHOSEN])
    retained = 100 * mean(REFUSES, "retain", 0)
    assert f"{retained:.0f} % of the words are then wrong in the end, {before:.1f} % before" in page
    all_at_hand = 100 * mean(REFUSES, "test", 0, "1", range(3))
    assert f"with all others at hand {all_at_hand:.1f} % in the end" in page
    ours, other = (costs(runs, variant, CHOSEN)[1] for variant in (REFUSES, PLAIN))
    assert f"{points(other - ours)} points where 90 % of the words are wrong" in page
    varied, plain = (costs(runs, f"OrthoGrad + NPO, kl{how}", range(2))[0].mean() for how in (", varied", ""))
    assert f"varied for two speakers, all parameters: {varied:.0f} % in the end, in place of {plain:.0f} %." in page
