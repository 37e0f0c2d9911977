"""When to stop: enough is forgotten, or what was to be kept has suffered more than was allowed."""

import copy
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import logging

from ..annotations import AnyDataset, EvalDatasets
from ..config import SCORE, OrthoGradConfig
from ..trials import preserved_random_state
from .observer import find_callback


if TYPE_CHECKING:
    from ..trainer import OrthoGradTrainer


logger = logging.get_logger(__name__)


class StoppingRule(TrainerCallback, ExportableState):
    """Judges every evaluation against the one before the first step; its state is saved in every checkpoint.

    Args:
        args ([`OrthoGradConfig`]): With `forget_target`, `retain_budget`, `stop_metric`, `stop_patience`.

    Attributes:
        baseline (`dict[str, float]`, *optional*): The stop metric on the "forget", "retain" and "reference" data
            before the first step.
        breaches (`int`): Evaluations outside of the budget in a row.
        forgotten (`float`, *optional*): The stop metric on the forget set at the last evaluation after a step.
        outcome (`str`, *optional*): In words without numbers why the rule ended the run, or that its end came before the target.
    """

    def __init__(self, args: OrthoGradConfig | None = None):
        self._reset(args)

    def _reset(self, args: OrthoGradConfig | None) -> None:
        self.args = args
        self.baseline: dict[str, float] | None = None
        self.breaches = 0
        self.forgotten: float | None = None
        self.outcome: str | None = None

    def state(self) -> dict:
        kept = {"baseline": self.baseline, "breaches": self.breaches, "forgotten": self.forgotten}
        return {"args": {}, "attributes": kept}

    def begin_run(
        self, args: OrthoGradConfig, state: TrainerState, *, evaluate: Callable[[], None], save: Callable[[], None]
    ) -> None:
        """Forgets an earlier run, takes up the one that a checkpoint is of, or takes the baseline of a new one.

        Args:
            args ([`OrthoGradConfig`]): Of the run.
            state (`TrainerState`): Of the run.
            evaluate (`Callable`): Evaluates the model, and gives the result to [`take_evaluation`].
            save (`Callable`): Saves a checkpoint: with a budget, what to go back to if no later model is inside of it.

        Raises:
            ValueError: The checkpoint was saved by a run without this rule.
        """
        self._reset(args)
        if state.global_step == 0:
            with preserved_random_state():
                evaluate()
            if args.retain_budget is not None:
                save()
                state.best_metric = 0.0
                state.best_model_checkpoint = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-0")
            return
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is None or saved["attributes"]["baseline"] is None:
            raise ValueError(
                "The checkpoint holds no evaluation from before the first step, against which `forget_target` and "
                "`retain_budget` are judged: it was saved without them. Resume without, or start from the beginning."
            )
        self.baseline, self.breaches = saved["attributes"]["baseline"], saved["attributes"]["breaches"]
        self.forgotten = saved["attributes"].get("forgotten")  # earlier versions did not keep it

    def take_evaluation(
        self,
        metrics: dict[str, float],
        evaluate_forget: Callable[[], dict[str, float]],
        state: TrainerState,
        control: TrainerControl,
    ) -> None:
        """Takes the first evaluation as the baseline and judges every other, adding [`SCORE`] to its metrics.

        `evaluate_forget` is called, and its metrics are added, if the evaluation lacks the stop metric on the forget set.
        """
        if f"eval_forget_{self.args.stop_metric}" not in metrics:
            metrics |= evaluate_forget()
        if self.baseline is None:
            self.take_baseline(metrics)
            return
        metrics[SCORE], why = self.judge(metrics)
        self.forgotten = metrics[f"eval_forget_{self.args.stop_metric}"]
        if why is not None:
            logger.warning(f"Stopping after step {state.global_step}: {why}.")
            control.should_training_stop = True
            if math.isfinite(metrics[SCORE]):
                self.outcome = "the forget target was reached"
            elif all(map(math.isfinite, self._read(metrics).values())):
                self.outcome = "the retain budget was exceeded"
            else:
                self.outcome = "an evaluation was not a finite number"

    def end_after(self, error: FloatingPointError, state: TrainerState, control: TrainerControl) -> bool:
        """Whether there is a model to go back to after a divergence; then training stops and Trainer does so."""
        if self.args.retain_budget is None:
            return False
        logger.warning(f"{error} Stopping, and going back to {state.best_model_checkpoint!r}.")
        control.should_training_stop = True
        self.outcome = "a loss or gradient was not finite"
        return True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Says so where training came to its end without an evaluation that found the forget target reached."""
        if self.target is None or self.outcome is not None or self._is_reached():
            return
        found = "no evaluation came after the first step"
        if self.forgotten is not None:
            found = f"at the last one `{self.args.stop_metric}` on the forget set was {self.forgotten:.4g}"
        longer = "max_steps" if args.max_steps > 0 else "num_train_epochs"
        logger.warning(
            f"Training ended after step {state.global_step}, and no evaluation found `forget_target` reached: {found}, the "
            f"target is {self.target:.4g}. Raise `{longer}` or `learning_rate`."
        )
        early = state.global_step < state.max_steps
        self.outcome = ("it was stopped" if early else "all steps were made") + " before the forget target was reached"

    def _is_reached(self) -> bool:
        """By the last evaluation, whatever the retain data has suffered."""
        sign = -1 if self.args.stop_greater_is_better else 1
        return self.forgotten is not None and sign * (self.forgotten - self.target) >= 0

    def take_baseline(self, metrics: Mapping[str, float]) -> None:
        """Takes the evaluation before the first step.

        Raises:
            ValueError: It lacks the metric that the rule goes by.
        """
        self.baseline = self._read(metrics)
        goal = "none" if self.target is None else f"{self.target:.4g}"
        logger.info(
            f"Before the first step `{self.args.stop_metric}` is {self.baseline}; the forget target is {goal}."
        )

    @property
    def target(self) -> float | None:
        """What the stop metric on the forget set is to reach."""
        if self.args.forget_target is None:
            return None
        return self.baseline["reference"] if self.args.forget_target == "reference" else self.args.forget_target

    def judge(self, metrics: Mapping[str, float]) -> tuple[float, str | None]:
        """Judges an evaluation.

        Returns:
            How much worse the forget set has become since the start, no further than the target, or minus infinity if
            the retain data has become worse than the budget allows; and why to stop, if so.
        """
        args, now = self.args, self._read(metrics)
        sign = -1 if args.stop_greater_is_better else 1  # positive differences are worse quality
        forgotten = sign * (now["forget"] - self.baseline["forget"])
        harm = sign * (now["retain"] - self.baseline["retain"]) if "retain" in now else 0.0
        finite = math.isfinite(forgotten) and math.isfinite(harm)
        if not finite or (args.retain_budget is not None and harm > args.retain_budget):
            self.breaches += 1
            over = f"`{args.stop_metric}` on the retain data has become worse by {harm:.4g}, the budget is {args.retain_budget}"
            return -math.inf, over if self.breaches > args.stop_patience or not finite else None
        self.breaches = 0
        if self.target is None:
            return forgotten, None
        distance = sign * (self.target - self.baseline["forget"])
        reached = forgotten >= distance
        why = f"`{args.stop_metric}` on the forget set is {now['forget']:.4g}, the target is {self.target:.4g}"
        return min(forgotten, max(distance, 0.0)), why if reached else None

    def _read(self, metrics: Mapping[str, float]) -> dict[str, float]:
        args, found = self.args, {}
        wanted = {"forget": "eval_forget_", "reference": "eval_reference_"}
        if args.retain_budget is not None:
            wanted["retain"] = "eval_retain_" if f"eval_retain_{args.stop_metric}" in metrics else "eval_"
        if args.forget_target != "reference":
            del wanted["reference"]
        for name, prefix in wanted.items():
            key = f"{prefix}{args.stop_metric}"
            if key not in metrics:
                raise ValueError(
                    f"`stop_metric` is {args.stop_metric!r}, but the evaluation gave no {key!r}; it gave "
                    f"{', '.join(sorted(metrics))}. Have `compute_metrics` return it, or name another."
                )
            found[name] = metrics[key]
        return found


def stop_or_raise(error: FloatingPointError, trainer: "OrthoGradTrainer") -> None:
    """At losses that are not finite: ends the run without a step if a rule has a model to go back to, and raises if not."""
    args, state = trainer.args, trainer.state
    error = FloatingPointError(
        f"At step {state.global_step + 1} {error}. No update was made; checkpoints saved so far in {args.output_dir!r} are "
        "intact. Lower the learning rate, set forget_loss='npo', or look at the samples."
    )
    rule = find_callback(trainer.callback_handler, StoppingRule)
    if rule is None or not rule.end_after(error, state, trainer.control):
        raise error from None
    trainer.model.zero_grad()  # of micro-batches before
    if trainer.accelerator.scaler is not None:  # it takes a step without any gradient for a mistake
        trained = (parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
        trainer.accelerator.backward(0.0 * sum(parameter.sum() for parameter in trained))


def check_stopping(
    args: OrthoGradConfig,
    forget_dataset: AnyDataset | None,
    eval_dataset: EvalDatasets | None,
    compute_metrics: Callable | None,
) -> None:
    """Checks that what the rule goes by will be evaluated.

    Raises:
        ValueError: There is nothing to forget, no evaluation, no data to evaluate on, or no way to compute the metric.
    """
    if not has_rule(args):
        return
    asked = "`retain_budget`" if args.retain_budget is not None else "`forget_target`"
    if forget_dataset is None:
        raise ValueError(f"{asked} is for unlearning, but there is no `forget_dataset`. Pass one, or leave it out.")
    if args.eval_strategy == "no":
        raise ValueError(
            f"{asked} is judged at evaluations, but `eval_strategy` is 'no'. Set it to 'steps' or 'epoch'."
        )
    if args.stop_metric != "loss" and compute_metrics is None:
        raise ValueError(f"`stop_metric` is {args.stop_metric!r}, which needs a `compute_metrics`.")
    names = set(eval_dataset) if isinstance(eval_dataset, dict) else set()
    if args.forget_target == "reference" and "reference" not in names:
        raise ValueError(
            "`forget_target` is 'reference', the level of data that the model never saw, but `eval_dataset` has no "
            f"'reference' among {sorted(names)}. Pass a dict with such data."
        )
    if args.retain_budget is not None and (eval_dataset is None or (names and "retain" not in names)):
        raise ValueError(
            f"`retain_budget` is {args.retain_budget}, but `eval_dataset` "
            + ("is missing." if eval_dataset is None else f"has no 'retain' among {sorted(names)}.")
            + " Pass retained data that is not in `train_dataset`, alone or under that name."
        )


def has_rule(args: OrthoGradConfig) -> bool:
    """Whether training may end by what evaluations say."""
    return args.forget_target is not None or args.retain_budget is not None


def keep_best_model(args: OrthoGradConfig) -> OrthoGradConfig:
    """Arguments under which Trainer saves and restores the best model inside the budget; a copy, if they have one.

    A run whose arguments are reused without the budget then has what the user set.
    """
    if args.retain_budget is None:
        return args
    kept = copy.copy(args)
    kept.metric_for_best_model, kept.greater_is_better, kept.load_best_model_at_end = SCORE, True, True
    kept.save_strategy = SaveStrategy.BEST
    if args.save_strategy != SaveStrategy.BEST:
        logger.info(
            f"`retain_budget` is {args.retain_budget}: checkpoints are saved when an evaluation is the best inside of it "
            f"(save_strategy='best'), not by save_strategy={str(args.save_strategy.value)!r}, and the best is restored."
        )
    return kept
