"""Where the examples' models come from, and what is refused before anything is loaded."""

import sys
from pathlib import Path

import pytest

from hf_orthograd import OrthoGradConfig


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from shared import ComparisonArguments, compared_models


@pytest.mark.parametrize(
    ("given", "model", "said"),
    [
        ({"retrain": True}, "m", "`--finetune_epochs` is 0"),
        ({"retrain": True, "finetune_epochs": 1, "reference_name_or_path": "r"}, "m", "both give a reference"),
        ({"original_name_or_path": "o"}, "m", "`--original_name_or_path` is for `--evaluate_only`"),
        ({"evaluate_only": True}, None, "pass `--model_name_or_path`"),
    ],
)
def test_arguments_that_exclude_each_other(given, model, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        ComparisonArguments(**given).check(OrthoGradConfig(str(tmp_path)), model)


def test_a_report_is_not_written_over(tmp_path):
    (tmp_path / "unlearning_report.json").touch()
    with pytest.raises(ValueError, match="holds a report, which would be lost. Name another"):
        ComparisonArguments(evaluate_only=True).check(OrthoGradConfig(str(tmp_path)), "m")
    ComparisonArguments().check(OrthoGradConfig(str(tmp_path)), "m")  # a new run writes a new one


def test_original_and_reference():
    def found(**given):
        return compared_models(
            "start", ComparisonArguments(**given), lambda sets: f"on {sets}", lambda name: f"loaded {name}"
        )

    assert found() == ("start", None)
    assert found(finetune_epochs=1, retrain=True) == ("on ['forget', 'others']", "on ['others']")
    assert found(finetune_epochs=1, reference_name_or_path="r") == ("on ['forget', 'others']", "loaded r")
    # the model is the unlearned one: it is trained no further, and is not the original
    assert found(finetune_epochs=1, retrain=True, evaluate_only=True) == (None, None)
    assert found(evaluate_only=True, original_name_or_path="o", reference_name_or_path="r") == ("loaded o", "loaded r")
