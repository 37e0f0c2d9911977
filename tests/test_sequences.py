"""What the tables of requests in turn rest on."""

import json
import sys
from pathlib import Path

import numpy as np
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
    continued = {f"{name}, {how}": measured(0.3) for name in sequences.NEW_DATA for how in sequences.HOW.values()}
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


def test_table_of_requests_in_turn_is_that_of_its_records(tmp_path):
    runs = json.loads((RESULTS / "study_sequences.json").read_text())["runs"]
    sequences.write_report(runs, tmp_path / "table")
    assert numbers_of(tmp_path / "table.md") == numbers_of(RESULTS / "study_sequences.md")


IN_TURN = {
    'OrthoGrad + NPO, "kl" to the original, varied, rate 3e-5': "OrthoGrad + NPO, kl, varied, to the original, 3e-5",
    'ONPO, "kl" to the original, varied, rate 3e-5': "ONPO, kl, varied, to the original, 3e-5",
    "OrthoGrad + NPO, labels": "OrthoGrad + NPO",
    "ONPO, labels": "ONPO",
    "NPO, labels": "NPO",
    "GradDiff, labels": "GradDiff",
}


def test_no_question_is_asked_where_it_was_at_hand():
    """And each set is of other people than those to forget and those who are new."""
    study = TextSequences(Path("unused"), None)
    request = study.request("turn", 1)
    sets, parts = study.sets(request, ""), study.parts(request)
    kept = {name: {tuple(row) for row in rows["input_ids"]} for name, rows in sets.items()}
    assert kept["retain"] | kept["retain_measured"] == kept["others"] and not kept["retain"] & kept["retain_measured"]
    assert {tuple(row) for part in parts for row in part["input_ids"]} == kept["forget"]
    apart = [kept[name] for name in ("forget", "others", "new", "new_asked", "test")]
    assert (
        sum(map(len, apart)) == len(set.union(*apart)) == 24 * 36 - 5 * 6
    )  # the forgotten are not asked in other words


def test_requests_in_turn_in_the_docs_are_those_of_the_records():
    runs = json.loads((RESULTS / "study_sequences.json").read_text())["runs"]
    page = (RESULTS.parent.parent / "docs" / "results.md").read_text().replace("**", "")

    def last(variant):
        return [runs[f"{variant} random-{seed}"]["after"][-1] for seed in range(3)]

    def gaps(variant):
        return np.array([gap(own, runs[f"retrained random-{seed}"]) for seed, own in enumerate(last(variant))])

    for shown, variant in IN_TURN.items():
        own, test = gaps(variant), np.mean([one["quality"]["test"][0] for one in last(variant)])
        cells = mean_and_interval(own), mean_and_interval(own - gaps(sequences.ONCE)), f"{test:.3f}"
        assert f"| {shown} | {' | '.join(cells)} |" in page
