"""Rows that stand in both sets: found before any step, whatever the sets are made of."""

import pytest
import torch
from conftest import MODELS, Samples
from datasets import Dataset
from test_bad_inputs import run, samples

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer


@pytest.mark.parametrize(
    ("forget", "retain"),
    [
        (
            {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "id": "a"},
            {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "id": "b"},
        ),
        (
            {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [5, 6, 7]},
            {"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0], "labels": [5, 6, 7, -100]},
        ),
        (
            {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([5, 6, 7])},
            {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
        ),
    ],
    ids=["but for an id", "but for padding", "a tensor and a list"],
)
@pytest.mark.parametrize("arrow", [False, True])
def test_rows_that_are_the_same_to_the_model_are_found(forget, retain, arrow, tmp_path):
    sets = {"forget_dataset": [forget], "train_dataset": [{**retain, "input_ids": retain["input_ids"]}]}
    if arrow and isinstance(forget["input_ids"], list):
        sets = {name: Dataset.from_list(rows) for name, rows in sets.items()}
    else:
        sets = {name: Samples(rows) for name, rows in sets.items()}
    assert "stand in both" in run({"kind": "llama", **sets}, tmp_path)


def test_the_search_for_shared_rows_can_be_left_out(tmp_path):
    shared = Samples(samples("vit", 4, 1))
    args = OrthoGradConfig(str(tmp_path), report_to="none", use_cpu=True, check_overlap=False)
    OrthoGradTrainer(MODELS["vit"](), args, train_dataset=shared, forget_dataset=shared)
