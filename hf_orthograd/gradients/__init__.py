"""From a forget and a retain batch to the inner products of their gradients."""

from .base import GradientEngine, Parameters, StepGradients, UnsupportedModelError
from .functional import FunctionalEngine
from .gram import GramEngine
from .layers import register_rule
from .loop import LoopEngine, MeanEngine
from .plain import PlainEngine
from .selection import choose_engine, preserved_modes, preserved_random_state


__all__ = [
    "FunctionalEngine",
    "GradientEngine",
    "GramEngine",
    "LoopEngine",
    "MeanEngine",
    "Parameters",
    "PlainEngine",
    "StepGradients",
    "UnsupportedModelError",
    "choose_engine",
    "preserved_modes",
    "preserved_random_state",
    "register_rule",
]
