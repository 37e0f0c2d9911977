"""What the guide says of the time of a step is in the records of the benchmark."""

import json
import statistics

import pytest
from test_studies import RESULTS


MODELS = ("vit-b-16", "wav2vec2-base", "llama-124m", "whisper-tiny")  # the columns of the guide's table
ROWS = {
    '"kl", 2 threads': ("gram_kl", dict.fromkeys(MODELS, "two_pass")),
    '"kl", beside the row below': (
        "gram_kl",
        {"vit-b-16": "stored", "llama-124m": "stored_tokens", "whisper-tiny": "stored_tokens"},
    ),
    '"kl", `precompute_ref_logits=True`': (
        "gram_kl_stored",
        {"vit-b-16": "stored", "llama-124m": "stored_tokens", "whisper-tiny": "stored_tokens"},
    ),
}


def rounds(results, model):
    """Seconds of each method in each round, of the record in which "nll" and "kl" took turns."""
    for line in (RESULTS / f"{results}_cpu.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "time" and record["case"][0] == model and "gram_kl" in record["result"]:
            return {method: own["times"] for method, own in record["result"].items() if "times" in own}
    raise LookupError(f"{results} has no times of {model}.")


@pytest.mark.parametrize("row", ROWS)
def test_the_time_of_a_retain_term_in_the_guide_is_that_of_the_records(row):
    method, files = ROWS[row]
    cells = []
    for model in MODELS:
        if model not in files:
            cells.append("not measured")
            continue
        times = rounds(files[model], model)
        ratios = [one / other for one, other in zip(times[method], times["gram"], strict=True)]
        assert len(ratios) >= 3
        cells.append(f"{statistics.median(ratios):.2f}")
    guide = (RESULTS.parent.parent / "docs" / "choosing_settings.md").read_text()
    assert f"| {row} | {' | '.join(cells)} |" in guide
