"""What watches a run: losses to compare with, stopping, what steps really do, and their correction."""

from transformers import TrainerCallback

from .correction import UpdateCorrection
from .monitor import UnlearningMonitor
from .observer import BeginCallback, Found, Record, StepObserver, find_callback
from .reference import ReferenceLosses, StartingFingerprint, objective_of
from .stopping import StoppingRule, check_stopping, has_rule, keep_best_model, stop_or_raise


__all__ = [
    "BeginCallback",
    "Found",
    "Record",
    "ReferenceLosses",
    "StartingFingerprint",
    "StepObserver",
    "StoppingRule",
    "UnlearningMonitor",
    "UpdateCorrection",
    "check_stopping",
    "find_callback",
    "has_rule",
    "keep_best_model",
    "objective_of",
    "set_callbacks",
    "stop_or_raise",
]


def set_callbacks(trainer) -> list[StepObserver]:
    """Gives a trainer the callbacks that its arguments ask for as they are now, in place of those of an earlier call.

    Args:
        trainer ([`OrthoGradTrainer`]): With a forget set. Its `record` takes what is logged, and its `begin_unlearning` is
            called before the first step.

    Returns:
        Those that see steps.

    Raises:
        ValueError: An argument was set to a value out of its range since the trainer was made.
    """
    args = trainer.args
    args.check_unlearning()
    for kind in (
        ReferenceLosses,
        StartingFingerprint,
        StoppingRule,
        UpdateCorrection,
        UnlearningMonitor,
        BeginCallback,
    ):
        trainer.remove_callback(kind)
    observers: list[StepObserver] = []
    if args.projection_target == "update":
        observers.append(UpdateCorrection(equality=args.alpha == 0, record=trainer.record))
    if trainer.has_retain:
        observers.append(UnlearningMonitor(args.monitor_steps, record=trainer.record))
    others: list[TrainerCallback] = [ReferenceLosses()] if args.forget_loss == "npo" else []
    if args.keeps_predictions:
        others.append(StartingFingerprint())
    if has_rule(args):
        others.append(StoppingRule(args))
    for callback in (*others, *observers, BeginCallback(trainer.begin_unlearning)):
        trainer.add_callback(callback)
    return observers
