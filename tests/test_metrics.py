import jiwer
import pytest

from hf_orthograd.evaluation import CharacterErrorRate, WordErrorRate


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


def test_batches_add_up():
    metric = WordErrorRate(keep_in_memory=True)
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute()["wer"] == pytest.approx(3 / 7)
