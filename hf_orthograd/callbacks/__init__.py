"""What watches a run: losses to compare with, stopping, what steps really do, and their correction."""

from transformers import TrainerCallback

from ..config import OrthoGradConfig
from .correction import UpdateCorrection
from .monitor import UnlearningMonitor
from .observer import BeginCallback, Found, Record, StepObserver, find_callback
from .reference import ReferenceLosses
from .stopping import StoppingRule, check_stopping, has_rule, keep_best_model


__all__ = [
    "BeginCallback",
    "Found",
    "Record",
    "ReferenceLosses",
    "StepObserver",
    "StoppingRule",
    "UnlearningMonitor",
    "UpdateCorrection",
    "check_stopping",
    "find_callback",
    "has_rule",
    "keep_best_model",
    "make_callbacks",
]


def make_callbacks(
    args: OrthoGradConfig, record: Record, *, has_retain: bool
) -> tuple[list[TrainerCallback], list[StepObserver]]:
    """Those that a configuration asks for: the ones that see evaluations and checkpoints, and the ones that see steps."""
    others: list[TrainerCallback] = [ReferenceLosses()] if args.forget_loss == "npo" else []
    if has_rule(args):
        others.append(StoppingRule(args))
    observers: list[StepObserver] = []
    if args.projection_target == "update":
        observers.append(UpdateCorrection(equality=args.alpha == 0, record=record))
    if has_retain:
        observers.append(UnlearningMonitor(args.monitor_steps, record=record))
    return others, observers
