"""[`evaluate_unlearning`]: did it forget, what did it cost, does it stay forgotten."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn
from transformers import Trainer

from ..objectives import class_losses, find_family
from .attacks import Attack, Relearning
from .measure import Measurement, base_model, column_values, examining, loss_function, measure
from .privacy import MembershipInference, loss_distance, membership_inference
from .quality import Accuracy, Quality, SampleMetric, summarize
from .report import Check, RelearningPoint, UnlearningReport
from .summary import average_gap, tug_of_war, unlearning_impact_score


# what an attack could bring back, and what it costs: attacked models are measured on these sets
ATTACKED = ("forget", "forget_unseen", "test")

# samples never trained on that forget samples are compared with; the first one present is the report's main one
NONMEMBERS = ("forget_unseen", "test")


@dataclass
class Tolerances:
    """How far from the reference a number may lie and still count as the same.

    Two models retrained with different seeds are not equal either: measure two on your data, and take their difference.

    Parameters:
        quality (`float`): Of the metric; of the loss, in nats, where there is no metric.
        auc (`float`): Of membership inference.
        distance (`float`): Of the Kolmogorov-Smirnov distance, whose ideal is 0.
        relearning (`float`): Of the mean, over watched steps, of the metric (or loss) regained beyond the reference's.
        erased (`float`): Under the goal "erased", accuracy up to which the forget set counts as failed on; for an error
            rate, 1 minus the rate.
    """

    quality: float = 0.05
    auc: float = 0.05
    distance: float = 0.15
    relearning: float = 0.05
    erased: float = 0.1


def evaluate_unlearning(
    trainer: Trainer,
    reference: nn.Module | None = None,
    attacks: Sequence[Attack] = (),
    *,
    original: nn.Module | None = None,
    datasets: Mapping[str, object] | None = None,
    metric: SampleMetric | None = None,
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
            models are measured on "forget", "forget_unseen" and "test".
        original (`torch.nn.Module`, *optional*): The model before unlearning.
        datasets (`Mapping`, *optional*): Named sets; `trainer.eval_dataset` by default. "forget", "retain" and "test"
            have the meaning of the words; "forget_unseen" is data of the forgotten source that was never trained on.
            Any other name is measured for its quality.
        metric ([`SampleMetric`], *optional*): For image, audio and text classifiers [`Accuracy`] by default; for others
            only losses are measured without one.
        group_column (`str`, *optional*): Column of the sets by which quality and membership are also taken in groups,
            as "speaker".
        goal (`str`, *optional*): "retrained", the forget set is to look as it does to the reference, or "erased", the
            model is to fail on it.
        tolerances ([`Tolerances`], *optional*): What counts as the same.
        cost (`Mapping`, *optional*): Further costs to stand in the report, as `{"retraining": {"seconds": 3600.0}}`, or
            `{"unlearning": {"peak_memory_gib": 2.0}}`, which is added to what the trainer's log says.
        seed (`int`): Of the bootstrap.

    Returns:
        [`UnlearningReport`].

    Raises:
        ValueError: No set "forget", an empty set, an unknown goal, two attacks of one name, or a loss that is not known
            per sample.
    """
    if goal not in ("retrained", "erased"):
        raise ValueError(f"`goal` must be 'retrained' or 'erased', but is {goal!r}.")
    names = [attack.name for attack in attacks]
    if len(set(names)) < len(names):
        raise ValueError(f"`attacks` must have names of their own, but they are {', '.join(names)}. Pass `name`.")
    datasets = _check_datasets(trainer.eval_dataset if datasets is None else datasets)
    if metric is None and _classifies(trainer):
        metric = Accuracy()
    groups = {name: column_values(rows, group_column) for name, rows in datasets.items()} if group_column else {}
    examination = _Examination(trainer, datasets, metric, groups, seed)
    models = {"unlearned": trainer.model, "original": original, "reference": reference}
    for name, model in models.items():
        if model is not None:
            examination.examine(name, model)
    for attack in attacks:
        for name in ("unlearned", "reference"):
            if models[name] is not None:
                examination.attack(attack, name, models[name])

    report = UnlearningReport(
        goal=goal,
        metric=None if metric is None else metric.name,
        greater_is_better=metric is None or metric.greater_is_better,
        models=examination.qualities,
        membership=examination.membership(),
        distances=examination.distances(),
        relearning=examination.relearning,
        cost=_costs(trainer, cost or {}),
        history=list(trainer.state.log_history),
        losses={
            model: {name: one.losses.tolist() for name, one in sets.items()}
            for model, sets in examination.measurements.items()
        },
    )
    _summarize(report)
    report.checks = _checks(report, tolerances or Tolerances(), names)
    return report


def _classifies(trainer: Trainer) -> bool:
    return loss_function(trainer) is None and find_family(base_model(trainer)) is class_losses


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

    def __init__(self, trainer: Trainer, datasets: dict, metric: SampleMetric | None, groups: dict, seed: int):
        self._trainer, self._datasets, self._metric, self._seed = trainer, datasets, metric, seed
        self._groups = groups
        self.measurements: dict[str, dict[str, Measurement]] = {}
        self.qualities: dict[str, dict[str, Quality]] = {}
        self.relearning: dict[str, dict[str, list[RelearningPoint]]] = {}

    def examine(self, name: str, model: nn.Module) -> None:
        self.measurements[name] = self._measure(name, model, tuple(self._datasets))

    def _measure(self, name: str, model: nn.Module, sets: tuple[str, ...]) -> dict[str, Measurement]:
        with examining(self._trainer, model):
            found = {of: measure(self._trainer, self._datasets[of], self._metric) for of in sets}
        self.qualities[name] = {of: self._quality(of, one) for of, one in found.items()}
        return found

    def attack(self, attack: Attack, name: str, model: nn.Module) -> None:
        model = self._trainer.accelerator.unwrap_model(model)
        if not isinstance(attack, Relearning):
            sets = tuple(of for of in ATTACKED if of in self._datasets)
            self._measure(f"{name}, {attack.name}", attack(model), sets)
            return
        before = self.qualities[name]["forget"]
        curve = [RelearningPoint(0, before.loss, before.value)]

        def observe(step: int, attacked: nn.Module) -> None:
            with examining(self._trainer, attacked):
                quality = self._quality("forget", measure(self._trainer, self._datasets["forget"], self._metric))
            curve.append(RelearningPoint(step, quality.loss, quality.value))

        attack(model, observe)
        self.relearning.setdefault(attack.name, {})[name] = curve

    def _quality(self, of: str, found: Measurement) -> Quality:
        better = self._metric is None or self._metric.greater_is_better
        return summarize(
            found.losses, found.counts, greater_is_better=better, groups=self._groups.get(of), seed=self._seed
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
    own = {
        "seconds": runs[-1]["train_runtime"] if runs else None,
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
    return rates | ({"auc": auc} if (auc := _auc(report, model)) is not None else {})


def _auc(report: UnlearningReport, model: str) -> float | None:
    found = report.membership.get(model, {})
    return next((found[name].auc for name in NONMEMBERS if name in found), None)


def _summarize(report: UnlearningReport) -> None:
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
        half = (report.models["original"]["forget"].value + report.models["reference"]["forget"].value) / 2
        report.recovery_steps = {
            attack: {model: _first_back(curve, half, report.greater_is_better) for model, curve in curves.items()}
            for attack, curves in report.relearning.items()
        }


def _first_back(curve: list[RelearningPoint], level: float, greater_is_better: bool) -> int | None:
    sign = 1 if greater_is_better else -1
    return next((point.step for point in curve if sign * (point.value - level) >= 0), None)


def _checks(report: UnlearningReport, tolerances: Tolerances, attacks: list[str]) -> list[Check]:
    goodness = _Goodness(report)
    unlearned, reference = report.models["unlearned"], report.models.get("reference", {})
    distance = report.distances.get("unlearned", {}).get("forget")
    checks = [_forget_check(report, goodness, tolerances)]
    for name in ("retain", "test"):
        if name in unlearned:
            rule = "no worse than the reference's"
            pair = goodness(unlearned, name), goodness(reference, name)
            holds = _holds(*pair, lambda a, b: b - a <= tolerances.quality)
            checks.append(goodness.check(f"{name} {goodness.name}", rule, *pair, tolerances.quality, holds))
    aucs = _auc(report, "unlearned"), _auc(report, "reference")
    holds = _holds(*aucs, lambda a, b: abs(a - b) <= tolerances.auc)
    checks.append(_check("MIA AUC", "equal to the reference's", *aucs, tolerances.auc, holds))
    holds = _holds(distance, 0.0, lambda a, _: a <= tolerances.distance)
    against = None if distance is None else 0.0
    rule = "losses distributed as the reference's"
    checks.append(_check("KS distance of forget losses", rule, distance, against, tolerances.distance, holds))
    for attack in attacks:
        if attack in report.relearning:
            checks.append(_relearning_check(report, goodness, attack, tolerances.relearning))
            continue
        rule = "the forget set no better than the reference's after the same"
        pair = tuple(
            goodness(report.models.get(f"{who}, {attack}", {}), "forget") for who in ("unlearned", "reference")
        )
        holds = _holds(*pair, lambda a, b: a - b <= tolerances.quality)
        name = f"forget {goodness.name} after {attack}"
        checks.append(goodness.check(name, rule, *pair, tolerances.quality, holds))
    return checks


class _Goodness:
    """The metric, or minus the loss where there is none, with its sign such that more is better."""

    def __init__(self, report: UnlearningReport):
        self.name = report.metric or "loss"
        self.sign = 1 if report.metric is not None and report.greater_is_better else -1
        self._is_loss = report.metric is None

    def __call__(self, sets: Mapping[str, Quality], name: str) -> float | None:
        return self.of(sets[name]) if name in sets else None

    def of(self, one: Quality | RelearningPoint) -> float:
        return self.sign * (one.loss if self._is_loss else one.value)

    def check(self, name: str, rule: str, value, compared_with, tolerance: float, holds: bool | None) -> Check:
        """With the metric's own sign."""
        signed = (None if one is None else self.sign * one for one in (value, compared_with))
        return _check(name, rule, *signed, tolerance, holds)


def _forget_check(report: UnlearningReport, goodness: _Goodness, tolerances: Tolerances) -> Check:
    value, name = goodness(report.models["unlearned"], "forget"), f"forget {goodness.name}"
    if report.goal == "retrained":
        reference = goodness(report.models.get("reference", {}), "forget")
        holds = _holds(value, reference, lambda a, b: abs(a - b) <= tolerances.quality)
        return goodness.check(name, "equal to the reference's", value, reference, tolerances.quality, holds)
    if report.metric is None:  # no level of a loss means failure
        return goodness.check(name, "failed on", value, None, 0.0, None)
    level = tolerances.erased if report.greater_is_better else tolerances.erased - 1
    rule = "at most this" if report.greater_is_better else "at least this"
    return goodness.check(name, rule, value, level, 0.0, value <= level)


def _relearning_check(report: UnlearningReport, goodness: _Goodness, attack: str, tolerance: float) -> Check:
    curves = report.relearning[attack]
    means = [
        float(np.mean([goodness.of(point) for point in curves[who]])) if who in curves else None
        for who in ("unlearned", "reference")
    ]
    holds = _holds(*means, lambda a, b: a - b <= tolerance)
    rule = "the mean over its curve no better than the reference's"
    return goodness.check(f"forget {goodness.name} under {attack}", rule, *means, tolerance, holds)


def _holds(value: float | None, compared_with: float | None, rule) -> bool | None:
    return None if value is None or compared_with is None else bool(rule(value, compared_with))


def _check(name: str, rule: str, value, compared_with, tolerance: float, holds: bool | None) -> Check:
    within = f" within {tolerance:g}" if tolerance else ""
    return Check(name, rule + within, value, compared_with, tolerance, holds)
