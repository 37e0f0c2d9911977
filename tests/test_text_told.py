"""What docs/results.md says of authors in a language model is what the study's records say."""

import sys
from pathlib import Path

import numpy as np
import pytest
from test_studies import RESULTS, numbers_of


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "studies"))

import text
from harness import Records
from tables import mean_and_interval


NAMES = {  # in the docs, in the records
    "original": "original", "retrained": "retrained", "gradient ascent": "gradient ascent", "GradDiff": "GradDiff", "NPO": "NPO",
    'NPO, "kl"': text.SAME_TERM, "SimNPO": "SimNPO", "RMU": "RMU", "UNDIAL": "UNDIAL",
    "OrthoGrad + NPO": "OrthoGrad + NPO", 'OrthoGrad + NPO, "kl"': text.DEFAULT,
    **{f'{name}, "kl", k = {k}': f"{name}, kl, k = {k}" for name in ("NPO", "OrthoGrad + NPO") for k in (16, 32)},
}  # fmt: skip


@pytest.fixture(scope="module")
def told():
    """The rows of the docs' table."""
    section = (
        (Path(__file__).parent.parent / "docs" / "results.md")
        .read_text()
        .split("## Authors, in a language model", 1)[1]
    )
    lines = [line for line in section.split("## ", 1)[0].splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in ([cell.strip("* ") for cell in line.split("|")[1:-1]] for line in lines)}


def test_rows_are_those_of_the_records(told):
    records = Records(RESULTS / "study_text.json").runs
    requests = [str(text.Request(seed, 1, text.AUTHORS)) for seed in text.TextStudy.seeds]

    def of(name):
        return [records[f"{name}, {'' if name in ('original', 'retrained') else 'full, '}{one}"] for one in requests]

    shown = {name: NAMES[name] for name in told if name in NAMES}
    assert {"original", "retrained", 'NPO, "kl"', 'OrthoGrad + NPO, "kl"'} <= set(shown)
    default = of(text.DEFAULT)
    for name, recorded in shown.items():
        own = of(recorded)
        rouge, others = ([one["sets"]["retain"]["rouge"] for one in records] for records in (own, default))
        cells = [
            mean_and_interval([one["utility"] for one in own]),
            mean_and_interval([one["utility"] - other["utility"] for one, other in zip(own, default, strict=True)]),
            f"{np.mean(rouge):.3f}",
            mean_and_interval(np.subtract(rouge, others)),
            f"{np.mean([one['extraction'] for one in own]):.3f}",
            f"{np.mean([one['forget_loss'] for one in own]):.2f}",
        ]
        if recorded in ("original", "retrained", text.DEFAULT):
            cells[1] = cells[3] = ""
        else:
            assert ", ".join(f"{one['quality']:.2g}" for one in own) == told[name][0], name
        assert told[name][1:] == cells, name


def test_one_method_is_told_from_the_default(told):
    """As the words behind the table say: all other intervals hold zero."""
    cells = {(name, column): row[column] for name, row in told.items() for column in (2, 4) if name in NAMES}
    pairs = {key: [float(number) for number in cell.split(" ± ")] for key, cell in cells.items() if " ± " in cell}
    assert [key for key, (mean, half) in pairs.items() if abs(mean) > half] == [("gradient ascent", 4)]


def test_times_of_a_step_are_those_of_the_records():
    records = Records(RESULTS / "study_text.json").runs

    def seconds(name):
        requests = (text.Request(seed, 1, text.AUTHORS) for seed in text.TextStudy.seeds)
        return np.median(
            [run["seconds"] / run["steps"] for run in (records[f"{name}, full, {one}"] for one in requests)]
        )

    held, labels = (
        seconds(ours) / seconds(own) for ours, own in ((text.DEFAULT, text.SAME_TERM), ("OrthoGrad + NPO", "NPO"))
    )
    written = (Path(__file__).parent.parent / "docs" / "results.md").read_text()
    assert f'took {held:.1f} times one of NPO with "kl", and {labels:.1f} times with labels' in written


def test_the_table_is_that_of_its_records(tmp_path):
    study = object.__new__(text.TextStudy)
    study.records, study.authors, study.forgotten = Records(RESULTS / "study_text.json"), text.AUTHORS, 1
    study.at_hand, study.asked = 4, 20
    text.write_report(study, tmp_path / "table")
    assert numbers_of(tmp_path / "table.md") == numbers_of(RESULTS / "study_text.md")
