"""From a forget and a retain batch to the inner products of their gradients."""

from .base import ForgetBatch, GradientEngine, Parameters, StepGradients, UnsupportedModelError
from .chunked import split_samples
from .functional import FunctionalEngine
from .gram import GramEngine
from .layers import register_rule
from .loop import LoopEngine, MeanEngine
from .pieces import Dense, Outer
from .plain import PlainEngine
from .randomness import preserved_random_state
from .selection import choose_engine, preserved_modes


__all__ = [
    "Dense",
    "ForgetBatch",
    "FunctionalEngine",
    "GradientEngine",
    "GramEngine",
    "LoopEngine",
    "MeanEngine",
    "Outer",
    "Parameters",
    "PlainEngine",
    "StepGradients",
    "UnsupportedModelError",
    "choose_engine",
    "preserved_modes",
    "preserved_random_state",
    "register_rule",
    "split_samples",
]
