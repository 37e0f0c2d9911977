import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features

from hf_orthograd import split_forget_retain
from hf_orthograd.data import present_values
from hf_orthograd.data.batches import SAMPLE_INDEX, IndexedCollator, IndexedDataset
from hf_orthograd.data.streams import CyclingBatchSampler


@pytest.fixture
def corpus():
    speakers = ["a"] * 10 + ["b"] * 20 + ["c"] * 70
    return Dataset.from_dict({"speaker": speakers, "number": list(range(100)), "sex": ["f", "m"] * 50})


def test_split_by_value_and_values(corpus):
    split = split_forget_retain(corpus, "speaker", "b")
    assert set(split["forget"]["speaker"]) == {"b"}
    assert set(split["retain"]["speaker"]) == {"a", "c"}
    assert len(split["forget"]) + len(split["retain"]) == 100
    assert len(split_forget_retain(corpus, "speaker", ["a", "b"])["forget"]) == 30


def test_classes_by_name_or_number():
    features = Features({"label": ClassLabel(names=["ant", "bee", "cat"])})
    rows = Dataset.from_dict({"label": [0, 1, 1, 2, -1]}, features=features)
    by_name = split_forget_retain(rows, "label", ["bee", "cat"])
    assert by_name["forget"]["label"] == split_forget_retain(rows, "label", [1, 2])["forget"]["label"] == [1, 1, 2]
    assert present_values(rows, "label", ["cat", "dog", 0]) == ["cat", 0]
    with pytest.raises(ValueError, match="tag"):
        present_values(rows, "tag", "cat")
    assert list(split_forget_retain(rows, "label", np.array([0]))["forget"]["label"]) == [0]
    with pytest.raises(
        ValueError, match=r"\['dog'\] do not occur in column 'label', which has -1, 'ant', 'bee', 'cat'"
    ):
        split_forget_retain(rows, "label", ["bee", "dog"])


def test_numbers_by_their_digits(corpus):
    """As a command line gives them."""
    by_digits = split_forget_retain(corpus, "number", ["3", "12"])
    assert by_digits["forget"]["number"] == [3, 12]
    assert present_values(corpus, "number", ["12", "120"]) == ["12"]
    with pytest.raises(
        ValueError, match=r"\['99x'\] do not occur in column 'number', which has 99, 0, .* and 50 more"
    ):
        split_forget_retain(corpus, "number", ["99x"])


def test_retain_size_and_seed(corpus):
    def rows(**settings):
        return list(split_forget_retain(corpus, "speaker", "a", retain_size=9, **settings)["retain"]["number"])

    assert len(rows()) == 9
    assert rows() == rows() == sorted(rows())
    assert rows(seed=1) != rows()
    assert len(split_forget_retain(corpus, "speaker", "a", retain_size=0.1)["retain"]) == 9


@pytest.mark.parametrize(("size", "expected"), [(9, (2, 7)), (45, (10, 35)), (2, (1, 1)), (90, (20, 70))])
def test_stratification(corpus, size, expected):
    retain = split_forget_retain(corpus, "speaker", "a", retain_size=size, stratify_by="speaker")["retain"]
    assert tuple(list(retain["speaker"]).count(speaker) for speaker in "bc") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("speaker", "z"), r"\['z'\] do not occur in column 'speaker', which has 'a', 'b', 'c'"),
        (("speaker", []), "do not occur"),
        (("singer", "a"), "`column` is 'singer', but the data set has columns speaker, number, sex"),
    ],
)
def test_unknown_names_list_what_there_is(corpus, arguments, message):
    with pytest.raises(ValueError, match=message):
        split_forget_retain(corpus, *arguments)


@pytest.mark.parametrize("size", [0, 91, -3, 1.5])
def test_retain_size_out_of_range(corpus, size):
    with pytest.raises(ValueError, match=f"`retain_size` is {size}, but 90 rows"):
        split_forget_retain(corpus, "speaker", "a", retain_size=size)


def test_unknown_stratification_column(corpus):
    with pytest.raises(ValueError, match="`stratify_by` is 'age'"):
        split_forget_retain(corpus, "speaker", "a", retain_size=9, stratify_by="age")


def test_batches_depend_on_seed_and_number_alone():
    sampler = CyclingBatchSampler(7, 3, seed=1)
    stream = iter(sampler)
    first = [next(stream) for _ in range(14)]
    assert first == [sampler.batch(number) for number in range(14)]
    resumed = iter(CyclingBatchSampler(7, 3, seed=1, start=5))
    assert [next(resumed) for _ in range(9)] == first[5:]
    # every pass is a shuffle of all rows, and no two passes are alike
    flat = [row for rows in first for row in rows]
    passes = [flat[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(rows) == list(range(7)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) > 1
    assert first != [CyclingBatchSampler(7, 3, seed=2).batch(number) for number in range(14)]


def test_processes_share_one_order():
    whole = CyclingBatchSampler(10, 4, seed=0)
    parts = [CyclingBatchSampler(10, 2, seed=0, process_index=rank, num_processes=2) for rank in range(2)]
    for number in range(8):
        assert parts[0].batch(number) + parts[1].batch(number) == whole.batch(number)


def test_batch_is_no_larger_than_the_set():
    assert sorted(CyclingBatchSampler(2, 8, seed=0).batch(3)) == [0, 1]


def test_row_numbers_travel_with_the_samples():
    dataset = IndexedDataset([{"x": torch.tensor(index)} for index in range(4)])
    collate = IndexedCollator(lambda examples: {"x": torch.stack([example["x"] for example in examples])})
    batch = collate([dataset[index] for index in (3, 1)])
    assert batch["x"].tolist() == batch[SAMPLE_INDEX].tolist() == [3, 1]


def test_seeds_share_no_order():
    """Pass 1 of one seed is not pass 0 of the next."""
    orders = [tuple(CyclingBatchSampler(50, 50, seed=seed).batch(number)) for seed in range(4) for number in range(4)]
    assert len(set(orders)) == len(orders)
