"""What the tables of recognisers that fail on speakers rest on."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MODELS
from datasets import Dataset
from test_studies import RESULTS, numbers_of


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "studies"))

import speakers
from more_directions import PartCollator, in_parts
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

# rows of which one method was not run
PARTIAL = ("ascended, the encoder's lower half", "the same, the first three, all others at hand")


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
    assert (None in both) is (label in PARTIAL)
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
    guide = (RESULTS.parent.parent / "docs" / "choosing_settings.md").read_text()
    assert f"{all_at_hand:.1f} % with all utterances at hand" in guide
    ours, other = (costs(runs, variant, FRESH) for variant in (REFUSES, PLAIN))
    end, wrong = (points(without - own) for own, without in zip(ours, other, strict=True))
    assert f"keeps {end} points in the end, and {wrong} where 90 % of the words are wrong" in page
    assert f"Over all ten the others' test WER is {costs(runs, REFUSES, range(10))[1].mean():.1f} % there" in page
    attacked = found(runs, "NPO, kl, lower encoder", [5])[0]["relearning"]
    said = "by ascending was attacked, too: {:.0f} % after one step, {:.0f} % after\nten."
    assert said.format(100 * attacked[1][1], 100 * attacked[3][1]) in page
    varied, plain = (costs(runs, f"OrthoGrad + NPO, kl{how}", range(2))[0].mean() for how in (", varied", ""))
    assert f"varied for two speakers, all parameters: {varied:.0f} % in the end, in place of {plain:.0f} %." in page
    parts, whole = (costs(runs, f"{REFUSES}{how}", [0])[1].item() for how in (", four parts", ""))
    assert (
        f"{parts:.0f} % where 90 % of the words were wrong, and {whole:.0f} % with a row for each utterance" in guide
    )


class Collate:
    """As a SpeechCollator, of rows of one length."""

    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))

    def __call__(self, rows):
        return {name: torch.tensor([row[name] for row in rows]) for name in ("input_features", "labels")}


def test_parts_of_a_transcript_make_up_its_loss():
    model, start = MODELS["whisper"]().eval(), 1
    features = torch.randn(model.config.num_mel_bins, 2 * model.config.max_source_positions)
    tokens = torch.tensor([5, 6, 7, 8, 9, 10, 2])
    rows = Dataset.from_dict({"input_features": [features.tolist()], "labels": [[start, *tokens.tolist()]]})
    parts = in_parts(rows, 3, start)
    batch = PartCollator(Collate())([parts[number] for number in range(3)])
    shared = {"input_features": features[None], "decoder_input_ids": torch.tensor([[start, *tokens[:-1]]])}
    held = (batch["labels"] != -100).sum(1)
    losses = [
        model(**{name: values[[number]] for name, values in batch.items()}).loss.item() * held[number]
        for number in range(3)
    ]
    assert held.tolist() == [3, 2, 2]
    assert sum(losses) / 7 == pytest.approx(model(**shared, labels=tokens[None]).loss.item(), rel=1e-5)
    with pytest.raises(ValueError, match="7 tokens, which make no 8 parts"):
        in_parts(rows, 8, start)
