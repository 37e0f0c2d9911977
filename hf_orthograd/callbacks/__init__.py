"""What watches a run: losses to compare with, stopping, what steps really do, and their correction."""

from typing import TYPE_CHECKING

from torch import nn
from transformers import TrainerCallback

from .correction import UpdateCorrection
from .monitor import UnlearningMonitor
from .observer import BeginCallback, Found, Record, StepObserver, find_callback
from .progress import LossesBesideTheBar, TrainingClock, show_one_bar
from .reference import ReferenceLosses, StartingFingerprint, objectives_of
from .stopping import StoppingRule, check_stopping, has_rule, keep_best_model, stop_or_raise


if TYPE_CHECKING:
    from ..trainer import OrthoGradTrainer


__all__ = [
    "BeginCallback",
    "Found",
    "LossesBesideTheBar",
    "Record",
    "ReferenceLosses",
    "StartingFingerprint",
    "StepObserver",
    "StoppingRule",
    "TrainingClock",
    "UnlearningMonitor",
    "UpdateCorrection",
    "begin_run",
    "check_stopping",
    "find_callback",
    "has_rule",
    "keep_best_model",
    "objectives_of",
    "set_callbacks",
    "show_one_bar",
    "stop_or_raise",
]


def set_callbacks(trainer: "OrthoGradTrainer") -> list[StepObserver]:
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
        TrainingClock,
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
    others: list[TrainerCallback] = [TrainingClock()]
    if args.forget_loss == "npo":
        others.append(ReferenceLosses())
    if args.keeps_predictions:
        others.append(StartingFingerprint())
    if has_rule(args):
        others.append(StoppingRule(args))
    for callback in (*others, *observers, BeginCallback(trainer.begin_unlearning)):
        trainer.add_callback(callback)
    return observers


def begin_run(trainer: "OrthoGradTrainer", model: nn.Module, observers: list[StepObserver]) -> None:
    """Takes what a run is compared with, before its first step; all processes have to come here.

    Args:
        trainer ([`OrthoGradTrainer`]): With its gradient engine.
        model (`torch.nn.Module`): Its model, wrapped as the launch has it.
    """
    if (reference := find_callback(trainer.callback_handler, ReferenceLosses)) is not None:
        rows = trainer.batches_of("forget_dataset"), len(trainer.forget_dataset)
        reference.begin_run(trainer.state, model, trainer.per_sample_loss, *rows)
    for observer in observers:
        observer.attach(trainer.gradient_engine.parameters, trainer.per_sample_loss, trainer.state.logging_steps)
