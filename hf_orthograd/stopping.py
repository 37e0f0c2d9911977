"""When to stop: enough is forgotten, or what was to be kept has suffered more than was allowed."""

import math
import os
from collections.abc import Mapping

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .config import SCORE, OrthoGradConfig
from .gradients import preserved_random_state


logger = logging.get_logger(__name__)


class StoppingRule(TrainerCallback, ExportableState):
    """Judges every evaluation against the one before the first step; its state is saved in every checkpoint.

    Args:
        args ([`OrthoGradConfig`]): With `forget_target`, `retain_budget`, `stop_metric`, `stop_patience`.

    Parameters:
        baseline (`dict[str, float]`, *optional*): The stop metric on the "forget", "retain" and "reference" data
            before the first step.
        breaches (`int`): Evaluations outside of the budget in a row.
    """

    def __init__(self, args: OrthoGradConfig | None = None):
        self.args = args
        self.baseline: dict[str, float] | None = None
        self.breaches = 0

    @classmethod
    def of(cls, handler: CallbackHandler) -> "StoppingRule | None":
        """The one among a trainer's callbacks, if there is one."""
        return next((callback for callback in handler.callbacks if isinstance(callback, cls)), None)

    def state(self) -> dict:
        return {"args": {}, "attributes": {"baseline": self.baseline, "breaches": self.breaches}}

    def on_train_begin(self, args, state, control, **kwargs):
        self.args, self.baseline, self.breaches = args, None, 0
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step > 0 and saved is not None:
            self.baseline, self.breaches = saved["attributes"]["baseline"], saved["attributes"]["breaches"]

    def begin(self, metrics: Mapping[str, float]) -> None:
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
        return self.baseline["reference"] if self.args.forget_target == "reference" else float(self.args.forget_target)

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


def check_stopping(args: OrthoGradConfig, forget_dataset, eval_dataset, compute_metrics) -> None:
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
    return args.forget_target is not None or args.retain_budget is not None


class JudgedTraining:
    """What [`OrthoGradTrainer`] adds to Trainer's evaluations; it expects to be mixed into a Trainer."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval", **gen_kwargs):
        """As in Trainer; while training under a stopping rule, the forget set is evaluated too."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)
        rule = StoppingRule.of(self.callback_handler)
        if rule is None or not self.is_in_train or eval_dataset is not None or metric_key_prefix != "eval":
            return metrics
        if f"eval_forget_{self.args.stop_metric}" not in metrics:
            metrics |= super().evaluate(self.forget_dataset, ignore_keys, "eval_forget", **gen_kwargs)
        if rule.baseline is None:
            rule.begin(metrics)
            return metrics
        metrics[SCORE], why = rule.judge(metrics)
        if why is not None:
            logger.warning(f"Stopping after step {self.state.global_step}: {why}.")
            self.control.should_training_stop = True
        return metrics

    def _begin_rule(self) -> None:
        """Evaluates before the first step, and saves what to go back to if no later model is inside the budget."""
        rule = StoppingRule.of(self.callback_handler)
        if rule is None or rule.baseline is not None:
            return
        if self.state.global_step > 0:
            raise ValueError(
                "The checkpoint holds no evaluation from before the first step, against which `forget_target` and "
                "`retain_budget` are judged: it was saved without them. Resume without, or start from the beginning."
            )
        with preserved_random_state():
            self.evaluate()
        if self.args.retain_budget is not None:
            self._save_checkpoint(self.model, trial=None)
            self.state.best_metric = 0.0
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.state.best_model_checkpoint = os.path.join(self.args.output_dir, folder)

    def _ends_with_the_best(self, error: FloatingPointError) -> bool:
        """Whether there is a model to go back to after a divergence; then training stops and does so."""
        if self.args.retain_budget is None or StoppingRule.of(self.callback_handler) is None:
            return False
        logger.warning(f"{error} Stopping, and going back to {self.state.best_model_checkpoint!r}.")
        self.control.should_training_stop = True
        return True
