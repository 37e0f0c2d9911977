"""What docs/results.md says of a speaker forgotten with the retain term "kl" is in the study's records."""

import json

import numpy as np
import pytest
from test_studies import RESULTS, gap, mean_and_interval, numbers_of, write_report


NAMES = {"SCRUB": "scrub", 'NPO, "kl"': "npo_kl", 'OrthoGrad + NPO, "kl"': "orthograd_npo_kl"}
SEEDS = range(3)


@pytest.fixture(scope="module")
def runs():
    return json.loads((RESULTS / "study_speech_kl.json").read_text())["runs"]


def rows_of(runs):
    """The guide's table: error rates in percent, the AUC, the average gap, and by how much it is larger than SCRUB's."""
    references = [runs[f"retrained speaker-{seed}"] for seed in SEEDS]
    found = {name: [runs[f"final speaker-{seed} 0.05 {method}"] for seed in SEEDS] for name, method in NAMES.items()}
    gaps = {name: np.array([gap(*pair) for pair in zip(own, references, strict=True)]) for name, own in found.items()}
    lines = []
    for name, own in {"retrained": references, **found}.items():
        rates = [
            f"{100 * np.mean([record['quality'][of][0] for record in own]):.1f} %"
            for of in ("forget", "retain", "test")
        ]
        cells = [*rates, f"{np.mean([record['auc']['test'] for record in own]):.3f}"]
        cells += [mean_and_interval(gaps[name]) if name in gaps else "0"]
        cells += [mean_and_interval(gaps[name] - gaps["SCRUB"]) if name in gaps and name != "SCRUB" else ""]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def test_rows_are_those_of_the_records(runs):
    told = (RESULTS.parent.parent / "docs" / "results.md").read_text().replace("**", "")
    for line in rows_of(runs):
        assert line in told


def test_the_table_is_that_of_its_records(runs, tmp_path):
    write_report(runs, tmp_path / "study", "speaker", SEEDS, ("0.05",), -1)
    assert numbers_of(tmp_path / "study.md") == numbers_of(RESULTS / "study_speech_kl_speaker.md")
