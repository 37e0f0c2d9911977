"""Error rates of transcripts as `evaluate` metrics that are part of the package: nothing is downloaded to load them."""

import datasets
import evaluate
import jiwer


_CITATION = """\
@inproceedings{morris2004,
  author = {Morris, Andrew and Maier, Viktoria and Green, Phil},
  title = {From WER and RIL to MER and WIL: improved evaluation measures for connected speech recognition},
  year = {2004}
}"""


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
        return {"wer": jiwer.wer(list(references), list(predictions))}


class CharacterErrorRate(_ErrorRate):
    """The same for characters, spaces included. `compute(...) -> {"cer": float}`"""

    unit = "character"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"cer": jiwer.cer(list(references), list(predictions))}
