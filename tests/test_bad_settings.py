"""Settings that are refused when they are made; `tests/test_bad_inputs.py` has all other bad input, and prints both."""

import math

import pytest

from hf_orthograd import OrthoGradConfig


NUMBER = "must be a number"
FINITE = "must be a finite number"
WHOLE = "must be a whole number"
SWITCH = "must be True or False"

# settings of OrthoGradConfig, and words of the ValueError
SETTINGS = [
    ({"alpha": 1.5}, "`alpha` must be a finite number from 0 to 1, but is 1.5"),
    ({"alpha": -0.1}, "`alpha` must be a finite number from 0 to 1, but is -0.1"),
    ({"alpha": math.nan}, "`alpha` must be a finite number from 0 to 1, but is nan"),
    ({"alpha": "0.5"}, "`alpha` must be a number, but is '0.5' (str)"),
    ({"alpha": None}, "`alpha` must be a number, but is None"),
    ({"alpha": True}, "`alpha` must be a number, but is True (bool)"),
    ({"npo_beta": 0.0}, "`npo_beta` must be positive, but is 0"),
    ({"npo_beta": -1.0}, "`npo_beta` must be a finite number of 0 or more, but is -1.0"),
    ({"npo_beta": math.inf}, "`npo_beta` must be a finite number of 0 or more, but is inf"),
    ({"npo_beta": "1"}, "`npo_beta` must be a number, but is '1'"),
    ({"simnpo_gamma": math.nan}, "`simnpo_gamma` must be a finite number, but is nan"),
    ({"simnpo_gamma": None}, "`simnpo_gamma` must be a number"),
    (
        {"per_device_forget_batch_size": 0},
        "`per_device_forget_batch_size` must be a whole number of 1 or more, but is 0",
    ),
    (
        {"per_device_forget_batch_size": 2.5},
        "`per_device_forget_batch_size` must be a whole number of 1 or more, but is 2.5",
    ),
    ({"per_device_forget_batch_size": None}, "`per_device_forget_batch_size` must be a whole number of 1 or more"),
    ({"func_chunk_size": 0}, "`func_chunk_size` must be a whole number of 1 or more, but is 0"),
    ({"retain_chunk_size": -2}, "`retain_chunk_size` must be a whole number of 1 or more, but is -2"),
    ({"retain_chunk_size": "4"}, "`retain_chunk_size` must be a whole number of 1 or more, but is '4'"),
    ({"monitor_steps": -1}, "`monitor_steps` must be a whole number of 0 or more, but is -1"),
    ({"stop_patience": -1}, "`stop_patience` must be a whole number of 0 or more, but is -1"),
    ({"stop_patience": 1.5}, "`stop_patience` must be a whole number"),
    ({"stop_metric": None}, "`stop_metric` must be the name of a metric, but is None"),
    ({"forget_loss": "descent"}, "`forget_loss` must be one of ascent, npo, simnpo, refusal, but is 'descent'"),
    ({"projection": "yes"}, "`projection` must be one of orthogonal, mean, none, but is 'yes'"),
    ({"projection": None}, "`projection` must be one of orthogonal, mean, none, but is None"),
    ({"projection_scope": "layer"}, "`projection_scope` must be one of global, per_tensor, but is 'layer'"),
    ({"projection_parameters": "all"}, "`projection_parameters` must be one of trainable, lora, but is 'all'"),
    ({"projection_target": "step"}, "`projection_target` must be one of gradient, update, but is 'step'"),
    ({"projection_target": "update", "projection": "none"}, "`projection_target` is 'update', which needs"),
    ({"gradient_engine": "fast"}, "`gradient_engine` must be one of auto, gram, func, loop, but is 'fast'"),
    ({"projection_solver": "qr"}, "`projection_solver` must be one of exact, cg, kaczmarz, but is 'qr'"),
    ({"projection_iterations": 5}, "has no iterations: use 'cg' or 'kaczmarz'"),
    (
        {"projection_solver": "cg", "projection_iterations": 0},
        "`projection_iterations` must be a whole number of 1 or more",
    ),
    ({"projection_rtol": 2.0}, "`projection_rtol` must be a finite number from 0 to 1, but is 2.0"),
    ({"projection_rtol": 0.0}, "`rtol` must lie strictly between 0 and 1"),
    ({"projection_rtol": "1e-3"}, "`projection_rtol` must be a number, but is '1e-3'"),
    ({"retain_budget": math.nan}, "`retain_budget` must be a finite number of 0 or more, but is nan"),
    ({"retain_budget": -0.1}, "`retain_budget` must be a finite number of 0 or more, but is -0.1"),
    ({"retain_budget": "small"}, "`retain_budget` must be a number, but is 'small'"),
    ({"retain_budget": 0.1, "metric_for_best_model": "loss"}, "`metric_for_best_model` is 'loss'"),
    ({"retain_budget": 0.1, "greater_is_better": False}, "`greater_is_better` False"),
    ({"forget_target": "nan"}, "`forget_target` must be a finite number, but is nan"),
    ({"forget_target": "soon"}, "`forget_target` must be a number or 'reference', but is 'soon'"),
    ({"forget_target": math.inf}, "`forget_target` must be a finite number, but is inf"),
    ({"forget_target": [1.0]}, "`forget_target` must be a number or 'reference', but is [1.0]"),
    ({"freeze_batch_norm": "yes"}, "`freeze_batch_norm` must be True or False, but is 'yes'"),
    ({"merge_adapter": None}, "`merge_adapter` must be True or False, but is None"),
    ({"stop_greater_is_better": 1}, "`stop_greater_is_better` must be True or False, but is 1"),
    ({"check_overlap": "no"}, "`check_overlap` must be True or False, but is 'no'"),
    (
        {"retain_chunk_size": 4, "projection": "mean"},
        "`retain_chunk_size` is 4, which needs `projection` to be orthogonal",
    ),
    ({"retain_chunk_size": 4, "gradient_engine": "loop"}, "`gradient_engine` to be auto or gram, but it is 'loop'"),
    (
        {"forget_loss": "refusal"},
        "forget_loss='refusal' needs `refusal_labels`, a list of labels, but it is None",
    ),
    ({"forget_loss": "refusal", "refusal_labels": []}, "a list of labels, but it is []"),
    ({"forget_loss": "refusal", "refusal_labels": "."}, "a list of labels, but it is '.'"),
    (
        {"forget_loss": "refusal", "refusal_labels": [3, -100]},
        "`refusal_labels` must be a whole number of 0 or more, but is -100",
    ),
    ({"refusal_labels": [3]}, "`refusal_labels` is [3], which only forget_loss='refusal' uses"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=str)
def test_settings(settings, message, tmp_path):
    with pytest.raises(ValueError) as raised:
        OrthoGradConfig(str(tmp_path), report_to="none", **settings)
    assert message in str(raised.value)
