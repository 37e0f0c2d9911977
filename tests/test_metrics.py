import jiwer
import numpy as np
import pytest
from scipy import stats

from hf_orthograd.evaluation import CharacterErrorRate, WordErrorRate
from hf_orthograd.evaluation.quality import bootstrap_interval


REFERENCES = ["the cat sat", "on the mat", "again"]
PREDICTIONS = ["the cat sat", "in the mat today", ""]


def test_word_error_rate_by_hand_and_by_jiwer():
    """7 words; one substitution, one insertion, one deletion."""
    rate = WordErrorRate(keep_in_memory=True).compute(predictions=PREDICTIONS, references=REFERENCES)["wer"]
    assert rate == pytest.approx(3 / 7)
    assert rate == jiwer.wer(REFERENCES, PREDICTIONS)


def test_character_error_rate():
    rate = CharacterErrorRate(keep_in_memory=True).compute(predictions=["cat"], references=["cart"])["cer"]
    assert rate == pytest.approx(1 / 4)


def test_an_interval_does_not_depend_on_parts():
    """Of 30000 samples 33 resamples fit into a part."""
    words = np.random.default_rng(1).integers(1, 30, 30000)
    errors = np.random.default_rng(2).binomial(words, 0.1)
    whole = stats.bootstrap(
        (errors, words), lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis), paired=True, vectorized=True, n_resamples=100,
        method="percentile", rng=np.random.default_rng(0),
    )  # fmt: skip
    found = bootstrap_interval(errors, words, resamples=100)
    assert found == tuple(whole.confidence_interval) and found[0] < 0.1 < found[1]


def test_batches_add_up():
    metric = WordErrorRate(keep_in_memory=True)
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute()["wer"] == pytest.approx(3 / 7)
