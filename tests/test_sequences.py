"""What the tables of requests in turn rest on."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from test_studies import RESULTS, numbers_of


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "studies"))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import sequences
from speaker_sequences import SpeakerSequences
from tables import gap, mean_and_interval
from text_sequences import TextSequences


def test_speakers_in_turn_are_compared_with_all_at_once(tmp_path):
    def measured(rate):
        named = ("forget", "retain", "test", *(f"request {number}" for number in range(1, 6)))
        return {"quality": {name: [rate, 1.0] for name in named}, "auc": {"test": 0.5}}

    runs = {"original turn-1": measured(0.1), "retrained turn-1": measured(0.3)}
    continued = {f"{name}, {how}": measured(0.3) for name in SpeakerSequences.new_data for how in sequences.HOW}
    for variant, rates in ((sequences.ONCE, [0.3]), (SpeakerSequences.ours, [0.9, 0.5, 0.5, 0.5, 0.4])):
        after = [measured(rate) for rate in rates]
        run = {"after": after, "continued": continued, "steps": [3] * len(rates), "seconds": 2.0}
        runs[f"{variant} turn-1"] = run
    sequences.write_report(runs, tmp_path / "table", SpeakerSequences)
    written = (tmp_path / "table.md").read_text()
    assert written.startswith("# Five speakers in turn, one seed")
    row = next(line for line in written.splitlines() if line.startswith(f"| {SpeakerSequences.ours} |"))
    # the gap, beside that of all at once, and the first speaker is back
    assert "| 0.075 | 0.075 | -0.500 | 15 |" in row


@pytest.mark.parametrize("study", [sequences.SequenceStudy, TextSequences, SpeakerSequences])
def test_table_of_requests_in_turn_is_that_of_its_records(study, tmp_path):
    runs = json.loads((RESULTS / f"study_{study.name}.json").read_text())["runs"]
    sequences.write_report(runs, tmp_path / "table", study)
    assert numbers_of(tmp_path / "table.md") == numbers_of(RESULTS / f"study_{study.name}.md")


IMAGES = {
    'OrthoGrad + NPO, "kl" to the original, varied, rate 3e-5': "OrthoGrad + NPO, kl, varied, to the original, 3e-5",
    'ONPO, "kl" to the original, varied, rate 3e-5': "ONPO, kl, varied, to the original, 3e-5",
    "OrthoGrad + NPO, labels": "OrthoGrad + NPO",
    "ONPO, labels": "ONPO",
    "NPO, labels": "NPO",
    "GradDiff, labels": "GradDiff",
    "retraining after each, another seed": "retraining after each",
}
PEOPLE = {
    'ONPO, "kl" to the original': "ONPO, kl, to the original",
    'OrthoGrad + NPO, "kl" to the original': TextSequences.ours,
    'OrthoGrad + NPO, "kl" to the model before, earlier held': "OrthoGrad + NPO, kl, earlier held",
    "ONPO, labels": "ONPO",
    'OrthoGrad + NPO, "kl" to the model before': "OrthoGrad + NPO, kl",
    'NPO, "kl" to the original': "NPO, kl, to the original",
    "OrthoGrad + NPO, labels": "OrthoGrad + NPO",
    "NPO, labels": "NPO",
    "GradDiff, labels": "GradDiff",
    "retraining after each, another seed": "retraining after each",
}


SPEAKERS = {
    name: PEOPLE[name]
    for name in (
        'OrthoGrad + NPO, "kl" to the original',
        "GradDiff, labels",
        "OrthoGrad + NPO, labels",
    )
}
PAGES = [
    ("random", "sequences", IMAGES, 3),
    ("turn", "text_sequences", PEOPLE, 3),
    ("turn", "speaker_sequences", SPEAKERS, 3),
]


@pytest.mark.parametrize("kind, name, shown, seeds", PAGES)
def test_requests_in_turn_in_the_docs_are_those_of_the_records(kind, name, shown, seeds):
    runs = json.loads((RESULTS / f"study_{name}.json").read_text())["runs"]
    page = (RESULTS.parent.parent / "docs" / "results.md").read_text().replace("**", "")

    def last(variant):
        return [runs[f"{variant} {kind}-{seed}"]["after"][-1] for seed in range(seeds)]

    def gaps(variant):
        return np.array([gap(own, runs[f"retrained {kind}-{seed}"]) for seed, own in enumerate(last(variant))])

    for label, variant in shown.items():
        means = [np.mean([one["quality"][of][0] for one in last(variant)]) for of in ("retain", "test")]
        own, rates = gaps(variant), [f"{mean:.3f}" for mean in (means if kind == "turn" else means[1:])]
        cells = mean_and_interval(own), mean_and_interval(own - gaps(sequences.ONCE)), *rates
        assert f"| {label} | {' | '.join(cells)} |" in page


BACK = {"watched": "watched", "held by `StaysForgotten`": "held at their level"}
LONGER = {name: name for name in ("watched, twice as long", "held, twice as long")}


@pytest.mark.parametrize(
    "name, ours, task, ways, seeds",
    [
        ("sequences", "OrthoGrad + NPO, kl, varied, to the original, 3e-5", "test", BACK, 3),
        ("text_sequences", TextSequences.ours, "new", BACK | LONGER, 3),
        ("speaker_sequences", SpeakerSequences.ours, "test", BACK, 3),
    ],
)
def test_those_who_come_back_in_the_docs_are_those_of_the_records(name, ours, task, ways, seeds):
    runs = json.loads((RESULTS / f"study_{name}.json").read_text())["runs"]
    page = (RESULTS.parent.parent / "docs" / "results.md").read_text()
    kind = "random" if name == "sequences" else "turn"
    found = [runs[f"{ours} {kind}-{seed}"] for seed in range(seeds)]
    for label, how in ways.items():
        after = [run["continued"][f"new with request 1, {how}"]["quality"] for run in found]
        before = [run["after"][-1]["quality"] for run in found]
        back = [one["request 1"][0] - start["request 1"][0] for one, start in zip(after, before, strict=True)]
        learned = mean_and_interval([one[task][0] for one in after])
        assert f"| {label} | {mean_and_interval(back)} | {learned} |" in page


def test_what_the_docs_say_of_held_recognisers_is_in_the_records():
    runs = json.loads((RESULTS / "study_speaker_sequences.json").read_text())["runs"]
    page = (RESULTS.parent.parent / "docs" / "results.md").read_text()
    ours, once = (
        [runs[f"{name} turn-{seed}"] for seed in range(3)] for name in (SpeakerSequences.ours, sequences.ONCE)
    )
    test = [[run["after"][-1]["quality"]["test"][0] for run in own] for own in (ours, once)]
    mean, interval = mean_and_interval(100 * np.subtract(*test)).split(" ± ")
    assert f"Test WER is {float(mean):.1f} points above that of all at once, ± {float(interval):.1f}." in page
    ways = [[run["continued"][f"new with request 1, {how}"]["quality"] for run in ours] for how in sequences.HOW]
    watched, held = ([one["test"][0] for one in way] for way in ways)
    worst = int(np.argmax(held))
    assert f"its test WER is {held[worst]:.0%}, watched {watched[worst]:.0%}".replace("%", " %") in page
    rise = ways[1][worst]["forget"][1] / ours[worst]["after"][-1]["quality"]["forget"][1]
    assert f"to {rise:.1f} times the loss at the start" in page
