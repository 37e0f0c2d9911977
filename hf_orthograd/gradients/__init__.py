"""From a forget and a retain batch to the inner products of their gradients."""

from .base import ForgetBatch, GradientEngine, StepGradients, UnsupportedModelError
from .functional import FunctionalEngine
from .gram import Call, Dense, GramEngine, Outer, Source, register_rule
from .loop import LoopEngine, MaterializedGradients, MeanEngine
from .plain import PlainEngine
from .selection import choose_engine
from .summary import check_finite, mean_retain_term, summarize_step, value_of


__all__ = [
    "Call",
    "Dense",
    "ForgetBatch",
    "FunctionalEngine",
    "GradientEngine",
    "GramEngine",
    "LoopEngine",
    "MaterializedGradients",
    "MeanEngine",
    "Outer",
    "PlainEngine",
    "Source",
    "StepGradients",
    "UnsupportedModelError",
    "check_finite",
    "choose_engine",
    "mean_retain_term",
    "register_rule",
    "summarize_step",
    "value_of",
]
