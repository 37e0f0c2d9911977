"""[`evaluate_unlearning`]: did it forget, what did it cost, does it stay forgotten."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

from torch import nn
from transformers import Trainer
from transformers.utils import logging

from ..callbacks import TrainingClock, find_callback
from ..objectives import PerSampleLoss
from .attacks import Attack, Relearning
from .checks import (
    NONMEMBERS,
    Tolerances,
    average_gap,
    check_report,
    main_auc,
    tug_of_war,
    unlearning_impact_score,
)
from .measure import Measurement, column_values, examining, loss_function, measure
from .membership import MembershipInference, loss_distance, membership_inference
from .metrics import Accuracy, SampleMetric
from .quality import Quality, summarize
from .reporting import HardestHit, RelearningPoint, UnlearningReport
from .settings import run_settings


logger = logging.get_logger(__name__)


# what an attack could bring back, and what it costs: attacked models are measured on these sets
ATTACKED = ("forget", "forget_unseen", "forget_reworded", "test")


def evaluate_unlearning(
    trainer: Trainer,
    reference: nn.Module | None = None,
    attacks: Sequence[Attack] = (),
    *,
    original: nn.Module | None = None,
    datasets: Mapping[str, object] | None = None,
    metric: SampleMetric | None = None,
    further_metrics: Sequence[SampleMetric] = (),
    group_column: str | None = None,
    goal: str = "retrained",
    tolerances: Tolerances | None = None,
    cost: Mapping[str, Mapping[str, float]] | None = None,
    seed: int = 0,
) -> UnlearningReport:
    """Measures the trainer's model, and beside it the models it is to be compared with.

    Args:
        trainer ([`~transformers.Trainer`]): Holds the unlearned model and evaluates it: its collator, batch size,
            generation settings and processes are used. With `predict_with_generate`, predictions are generated.
        reference (`torch.nn.Module`, *optional*): A model retrained without the forget set. Without one, nothing that
            needs a comparison is judged.
        attacks (`Sequence[Attack]`, *optional*): What is done to the unlearned model and to the reference alike. Attacked
            models are measured on "forget", "forget_unseen", "forget_reworded" and "test".
        original (`torch.nn.Module`, *optional*): The model before unlearning.
        datasets (`Mapping`, *optional*): Named sets; `trainer.eval_dataset` by default. "forget", "retain" and "test"
            have the meaning of the words. "forget_unseen" is data of the forgotten source that was never trained on.
            "forget_reworded" asks for the forgotten in words that were never trained on. Any other name is measured
            for its quality.
        metric ([`SampleMetric`], *optional*): For image, audio and text classifiers [`Accuracy`] by default; for others
            only losses are measured without one.
        further_metrics (`Sequence[SampleMetric]`, *optional*): Reported beside it and not judged, as character errors
            beside word errors.
        group_column (`str`, *optional*): Column of the sets by which quality and membership are also taken in groups,
            as "speaker".
        goal (`str`, *optional*): "retrained", the forget set is to look as it does to the reference, or "erased", the
            model is to fail on it.
        tolerances ([`Tolerances`], *optional*): What counts as the same.
        cost (`Mapping`, *optional*): Further costs to stand in the report, as `{"retraining": {"seconds": 3600.0}}`, or
            `{"unlearning": {"peak_memory_gib": 2.0}}`, which is added to what the trainer's log says.
        seed (`int`): Of the bootstrap.

    Raises:
        ValueError: No set "forget", an empty set, an unknown goal, two attacks or two metrics of one name, or a loss that is not known
            per sample.
    """
    names = _check_goal(goal, attacks)
    datasets = _check_datasets(trainer.eval_dataset if datasets is None else datasets)
    metric = Accuracy() if metric is None and _classifies(trainer) else metric
    metrics = _check_metrics(metric, further_metrics)
    groups = {name: column_values(rows, group_column) for name, rows in datasets.items()} if group_column else {}
    examination = _Examination(trainer, datasets, metric, metrics, groups, seed)
    models = {"unlearned": trainer.model, "original": original, "reference": reference}
    examination.examine_all(models, attacks)
    if examination.reference_has_learned():
        logger.warning(
            "The reference has no more loss on the set 'forget' than the original: it seems to have learned it, too, and the report compares "
            "with it. A reference is trained without the forget set, and does not start from a model that has seen it."
        )
    report = examination.report(goal, _costs(trainer, cost or {}))
    _summarize(report, examination.levels)
    report.hardest_hit = _hardest_hit(report)
    report.checks = check_report(report, tolerances or Tolerances(), names)
    return report


def _classifies(trainer: Trainer) -> bool:
    return PerSampleLoss(trainer.accelerator.unwrap_model(trainer.model), loss_function(trainer)).classifies


def _check_goal(goal: str, attacks: Sequence[Attack]) -> list[str]:
    if goal not in ("retrained", "erased"):
        raise ValueError(f"`goal` must be 'retrained' or 'erased', but is {goal!r}.")
    names = [attack.name for attack in attacks]
    if len(set(names)) < len(names):
        raise ValueError(f"`attacks` must have names of their own, but they are {', '.join(names)}. Pass `name`.")
    return names


def _check_metrics(metric: SampleMetric | None, further: Sequence[SampleMetric]) -> list[SampleMetric]:
    metrics = [*([] if metric is None else [metric]), *further]
    if len({one.name for one in metrics}) < len(metrics):
        raise ValueError(
            "`metric` and `further_metrics` must have names of their own, but they are "
            f"{', '.join(one.name for one in metrics)}."
        )
    return metrics


def _check_datasets(datasets) -> dict:
    if not isinstance(datasets, Mapping) or "forget" not in datasets:
        found = sorted(datasets) if isinstance(datasets, Mapping) else type(datasets).__name__
        raise ValueError(
            f"`datasets`, or the trainer's `eval_dataset`, must be a dict with the set 'forget', but is {found}."
        )
    empty = [name for name, rows in datasets.items() if len(rows) == 0]
    if empty:
        raise ValueError(f"`datasets` has sets without rows: {', '.join(empty)}. Leave them out.")
    return dict(datasets)


class _Examination:
    """Everything measured so far."""

    def __init__(
        self,
        trainer: Trainer,
        datasets: dict,
        metric: SampleMetric | None,
        metrics: Sequence[SampleMetric],
        groups: dict,
        seed: int,
    ):
        self._trainer, self._datasets, self._metric, self._seed = trainer, datasets, metric, seed
        self._metrics, self._groups = metrics, groups
        self.measurements: dict[str, dict[str, Measurement]] = {}
        self.qualities: dict[str, dict[str, Quality]] = {}
        self.relearning: dict[str, dict[str, list[RelearningPoint]]] = {}
        self.levels: dict[str, float | None] = {}  # of the original, on what each curve of relearning is of

    def examine_all(self, models: Mapping[str, nn.Module | None], attacks: Sequence[Attack]) -> None:
        """Measures each model that there is, and the attacked ones of those that attacks are made on."""
        given = {name: model for name, model in models.items() if model is not None}
        for name, model in given.items():
            self.examine(name, model)
        for attack in attacks:
            for name in ("unlearned", "reference"):
                if name in given:
                    self.attack(attack, name, given[name])
            if isinstance(attack, Relearning) and "original" in given:
                self.levels[attack.name] = self._before(attack, "original", given["original"]).value

    def reference_has_learned(self) -> bool:
        """Whether it has no more loss on the forget set than the original, where both are there."""
        if not {"reference", "original"} <= self.qualities.keys():
            return False
        reference, original = (self.qualities[name]["forget"].loss for name in ("reference", "original"))
        return reference <= original

    def examine(self, name: str, model: nn.Module) -> None:
        self.measurements[name] = self._measure(name, model, tuple(self._datasets))

    def _measure(self, name: str, model: nn.Module, sets: tuple[str, ...]) -> dict[str, Measurement]:
        with examining(self._trainer, model):
            found = {of: measure(self._trainer, self._datasets[of], self._metrics) for of in sets}
        self.qualities[name] = {of: self._quality(of, one) for of, one in found.items()}
        return found

    def attack(self, attack: Attack, name: str, model: nn.Module) -> None:
        model = self._trainer.accelerator.unwrap_model(model)
        if not isinstance(attack, Relearning):
            sets = tuple(of for of in ATTACKED if of in self._datasets)
            self._measure(f"{name}, {attack.name}", attack(model), sets)
            return
        before = self._before(attack, name, model)
        curve = [RelearningPoint(0, before.loss, before.value)]

        def observe(step: int, attacked: nn.Module) -> None:
            quality = self._relearned(attack, attacked)
            curve.append(RelearningPoint(step, quality.loss, quality.value))

        attack(model, observe)
        self.relearning.setdefault(attack.name, {})[name] = curve

    def _before(self, attack: Relearning, name: str, model: nn.Module) -> Quality:
        """What the curve begins with; all of "forget" has been measured already."""
        return self.qualities[name]["forget"] if attack.measured is None else self._relearned(attack, model)

    def _relearned(self, attack: Relearning, model: nn.Module) -> Quality:
        rows = self._datasets["forget"] if attack.measured is None else attack.measured
        with examining(self._trainer, model):
            return self._quality(None, measure(self._trainer, rows, self._metrics))

    def _quality(self, of: str | None, found: Measurement) -> Quality:
        better = self._metric is None or self._metric.greater_is_better
        main = None if self._metric is None else self._metric.name
        return summarize(
            found.losses,
            found.counts.get(main),
            greater_is_better=better,
            groups=None if of is None else self._groups.get(of),
            further={name: counts for name, counts in found.counts.items() if name != main},
            seed=self._seed,
        )

    def report(self, goal: str, cost: dict[str, dict[str, float | None]]) -> UnlearningReport:
        """Of all that was measured, before anything is compared."""
        from .. import __version__  # not with the others: stubs, by which types are checked, leave this name out

        return UnlearningReport(
            goal=goal,
            metric=None if self._metric is None else self._metric.name,
            greater_is_better=self._metric is None or self._metric.greater_is_better,
            models=self.qualities,
            membership=self.membership(),
            distances=self.distances(),
            relearning=self.relearning,
            cost=cost,
            settings=run_settings(self._trainer),
            history=list(self._trainer.state.log_history),
            losses={
                model: {name: one.losses.tolist() for name, one in sets.items()}
                for model, sets in self.measurements.items()
            },
            made=f"{datetime.now(timezone.utc).date()}, hf_orthograd {__version__}",
        )

    def membership(self) -> dict[str, dict[str, MembershipInference]]:
        found = {}
        for model, sets in self.measurements.items():
            found[model] = {}
            for name in (name for name in NONMEMBERS if name in sets):
                losses = sets["forget"].losses, sets[name].losses
                found[model][name] = membership_inference(*losses)
                groups = self._groups.get("forget"), self._groups.get(name)
                # groups can be told apart where they differ: a speaker from other speakers
                if groups[0] is not None and not set(groups[0]) & set(groups[1]):
                    found[model][f"{name}, by group"] = membership_inference(
                        *losses, member_groups=groups[0], nonmember_groups=groups[1]
                    )
        return found

    def distances(self) -> dict[str, dict[str, float]]:
        if "reference" not in self.measurements:
            return {}
        reference = self.measurements["reference"]
        return {
            model: {name: loss_distance(one.losses, reference[name].losses) for name, one in sets.items()}
            for model, sets in self.measurements.items()
            if model != "reference"
        }


def _costs(trainer: Trainer, further: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    runs = [entry for entry in trainer.state.log_history if "train_runtime" in entry]
    clock = find_callback(trainer.callback_handler, TrainingClock)
    earlier = 0.0 if clock is None else clock.earlier  # of a run that went on from a checkpoint
    own = {
        "seconds": runs[-1]["train_runtime"] + earlier if runs else None,
        "steps": trainer.state.global_step if runs else None,
    }
    costs = {"unlearning": {**own, "peak_memory_gib": None}}
    for what, values in further.items():
        costs[what] = {**costs.get(what, {}), **values}
    return costs


def _rates(report: UnlearningReport, model: str) -> dict[str, float]:
    """Rates in [0, 1] on forget, retain and test, where measured, and the AUC."""
    sets = report.models.get(model, {})
    rates = {name: min(sets[name].value, 1.0) for name in ("forget", "retain", "test") if name in sets}
    return rates | ({"auc": auc} if (auc := main_auc(report, model)) is not None else {})


def _summarize(report: UnlearningReport, levels: Mapping[str, float]) -> None:
    """Fills in what sums the report up; `levels` are the original's, where each curve of relearning would begin."""
    report.summary = dict.fromkeys(("tug_of_war", "average_gap", "unlearning_impact_score"))
    if report.metric is None:
        return
    unlearned, original = report.models["unlearned"], report.models.get("original", {})
    if "reference" in report.models:
        rates = _rates(report, "unlearned"), _rates(report, "reference")
        report.summary["average_gap"] = average_gap(*rates)
        if {"forget", "retain", "test"} <= set(rates[0]):
            report.summary["tug_of_war"] = tug_of_war(*rates)
    if "test" in original:
        better = report.greater_is_better
        original_test, test, forget = (
            min(one.value, 1.0) if better else 1 - min(one.value, 1.0)
            for one in (original["test"], unlearned["test"], unlearned["forget"])
        )
        if original_test > 0:
            report.summary["unlearning_impact_score"] = unlearning_impact_score(
                original_test, test, forget, erased=report.goal == "erased"
            )
    if "original" in report.models and "reference" in report.models:
        for attack, curves in report.relearning.items():
            half = (levels[attack] + curves["reference"][0].value) / 2
            report.recovery_steps[attack] = {
                model: _first_back(curve, half, report.greater_is_better) for model, curve in curves.items()
            }


def _hardest_hit(report: UnlearningReport) -> dict[str, HardestHit]:
    """Of the retained sets, the group that lost most, if any lost."""
    sign, found = 1 if report.greater_is_better else -1, {}
    for name in ("retain", "test"):
        pair = [report.models.get(model, {}).get(name) for model in ("original", "unlearned")]
        if None not in pair and all(one.groups for one in pair):
            before, after = (one.groups for one in pair)
            group = max(before, key=lambda group: sign * (before[group] - after[group]))
            if sign * (before[group] - after[group]) > 0:
                found[name] = HardestHit(group, before[group], after[group])
    return found


def _first_back(curve: list[RelearningPoint], level: float, greater_is_better: bool) -> int | None:
    sign = 1 if greater_is_better else -1
    return next((point.step for point in curve if sign * (point.value - level) >= 0), None)
