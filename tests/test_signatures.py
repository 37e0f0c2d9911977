"""What the trainer overrides or calls in transformers must keep its shape: a change there should fail here first."""

import inspect

import pytest
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_callback import ExportableState, TrainerState

from hf_orthograd import OrthoGradTrainer


def names(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("training_step", ["self", "model", "inputs", "num_items_in_batch"]),
        ("compute_loss", ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]),
        ("get_train_dataloader", ["self"]),
        ("save_model", ["self", "output_dir", "_internal_call"]),
        ("_issue_warnings_after_load", ["self", "load_result"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("_load_best_model", ["self"]),
    ],
)
def test_overridden_methods(method, expected):
    assert names(getattr(Trainer, method)) == names(getattr(OrthoGradTrainer, method)) == expected


def test_called_methods():
    assert {"dataset", "description", "batch_size", "sampler_fn", "is_training"} <= set(names(Trainer._get_dataloader))
    assert names(Trainer._remove_unused_columns) == ["self", "dataset", "description"]
    assert names(Trainer._get_collator_with_removed_columns) == ["self", "data_collator", "description"]
    assert names(Trainer._get_train_sampler) == ["self", "train_dataset"]
    assert names(Trainer._save_checkpoint) == ["self", "model", "trial"]
    assert names(Trainer.log)[:2] == ["self", "logs"]
    assert hasattr(ExportableState, "state")
    assert "stateful_callbacks" in names(TrainerState)


def test_constructor_takes_what_trainer_takes_in_its_order():
    ours = inspect.signature(OrthoGradTrainer.__init__).parameters
    own = ["forget_dataset", "ref_model", "compute_divergence_func"]
    assert [name for name in ours if name not in own] == names(Trainer.__init__)
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in own)
    assert set(names(Seq2SeqTrainer.__init__)) <= set(ours)
