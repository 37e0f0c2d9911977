"""Accuracy and error rates: sample by sample for reports, and as `evaluate` metrics that need no download."""

from collections.abc import Callable, Sequence
from typing import Protocol

import datasets
import evaluate
import jiwer
import numpy as np
from transformers import EvalPrediction


_CITATION = """\
@inproceedings{morris2004,
  author = {Morris, Andrew and Maier, Viktoria and Green, Phil},
  title = {From WER and RIL to MER and WIL: improved evaluation measures for connected speech recognition},
  year = {2004}
}"""


def edit_counts(predictions: Sequence[str], references: Sequence[str], unit: str) -> tuple[np.ndarray, np.ndarray]:
    """Edits of each transcript, and units of its reference, shape (n,) each, by jiwer.

    Args:
        predictions, references (`Sequence[str]`): Transcripts, normalised alike.
        unit (`str`): "word" or "character", spaces included.
    """
    process = jiwer.process_words if unit == "word" else jiwer.process_characters
    edits, units = [], []
    for prediction, reference in zip(predictions, references, strict=True):
        found = process(reference, prediction)
        edits.append(found.substitutions + found.deletions + found.insertions)
        units.append(found.hits + found.substitutions + found.deletions)
    return np.array(edits, dtype=float), np.array(units, dtype=float)


class SampleMetric(Protocol):
    """A metric that is a sum over samples divided by another: accuracy, word error rate.

    Attributes:
        name (`str`): How reports call it.
        greater_is_better (`bool`): Whether more of it is better quality.
    """

    name: str
    greater_is_better: bool

    def counts(self, prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
        """Returns numerators and denominators, shape (n,) each; the metric is the ratio of their sums."""
        ...


def likeliest_classes(prediction: EvalPrediction) -> np.ndarray:
    """From logits (n, classes), or a tuple that begins with them, to (n,)."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return np.argmax(logits, axis=-1)


class Accuracy:
    """Share of samples whose most likely class is their label. Predictions are logits (n, classes)."""

    name, greater_is_better = "accuracy", True

    def counts(self, prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
        right = likeliest_classes(prediction) == prediction.label_ids
        return right.astype(float), np.ones(len(right))


class WordErrors:
    """Word error rate: word edits of each utterance over the words of its reference, by jiwer.

    Args:
        transcribe (`Callable`): From an `EvalPrediction` to (predicted, reference) transcripts, as
            [`~hf_orthograd.data.speech.transcripts`] returns.
    """

    name, greater_is_better, unit = "wer", False, "word"

    def __init__(self, transcribe: Callable[[EvalPrediction], tuple[list[str], list[str]]]):
        self._transcribe = transcribe

    def counts(self, prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
        hypotheses, references = self._transcribe(prediction)
        return edit_counts(hypotheses, references, self.unit)


class CharacterErrors(WordErrors):
    """Character error rate; otherwise as [`WordErrors`]."""

    name, unit = "cer", "character"


class Refusals:
    """Share of samples to which the answer of forget_loss="refusal" is given: wanted on the forget set, an error on others.

    Beside another metric, in `further_metrics`: it looks at no label.

    Args:
        refusal (`str` or `int`): The answer: a class, or a text as `answers` returns it, normalised alike.
        answers (`Callable`, *optional*): From an `EvalPrediction` to the answers, (n,); by default the most likely classes.
    """

    name, greater_is_better = "refusals", False

    def __init__(self, refusal: str | int, answers: Callable[[EvalPrediction], Sequence] | None = None):
        self._refusal, self._answers = refusal, answers or likeliest_classes

    def counts(self, prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
        refused = np.array([answer == self._refusal for answer in self._answers(prediction)], dtype=float)
        return refused, np.ones(len(refused))


class _ErrorRate(evaluate.Metric):
    unit: str

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=f"{self.unit.capitalize()} error rate: substitutions, deletions and insertions per {self.unit}.",
            citation=_CITATION,
            inputs_description="predictions, references: lists of transcripts, normalised alike.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://github.com/jitsi/jiwer"],
        )


class WordErrorRate(_ErrorRate):
    """Word edits over all utterances divided by words in the references; 0 is perfect, above 1 is possible.

    `compute(predictions=list[str], references=list[str]) -> {"wer": float}`
    """

    unit = "word"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        edits, words = edit_counts(predictions, references, self.unit)
        return {"wer": float(edits.sum() / words.sum())}


class CharacterErrorRate(_ErrorRate):
    """The same for characters, spaces included. `compute(...) -> {"cer": float}`"""

    unit = "character"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        edits, characters = edit_counts(predictions, references, self.unit)
        return {"cer": float(edits.sum() / characters.sum())}
