"""A report's numbers against the reference's: which hold, which do not, and which nothing is known of."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .quality import Quality
from .reporting import Check, RelearningPoint, UnlearningReport


FORGOTTEN = ("forget", "forget_reworded")
# samples never trained on that forget samples are compared with; the first one present is the report's main one
NONMEMBERS = ("forget_unseen", "test")


@dataclass
class Tolerances:
    """How far from the reference a number may lie and still count as the same.

    Two models retrained with different seeds are not equal either: measure two on your data, and take their difference.

    Attributes:
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


def check_report(report: UnlearningReport, tolerances: Tolerances, attacks: list[str]) -> list[Check]:
    """Each number that tells of forgetting against the reference's, in the order of the report's first table.

    Args:
        attacks (`list[str]`): Names of those that were made.
    """
    goodness = _Goodness(report)
    unlearned, original, reference = (report.models.get(who, {}) for who in ("unlearned", "original", "reference"))
    distance = report.distances.get("unlearned", {}).get("forget")
    checks = [_forget_check(report, goodness, tolerances, name) for name in FORGOTTEN if name in unlearned]
    for name in ("retain", "test"):
        if name in unlearned:
            rule = "no worse than the reference's"
            pair = goodness(unlearned, name), goodness(reference, name)
            holds = _holds(*pair, lambda a, b: b - a <= tolerances.quality)
            before = goodness(original, name)
            checks.append(goodness.check(f"{name} {goodness.name}", rule, *pair, tolerances.quality, holds, before))
    aucs = main_auc(report, "unlearned"), main_auc(report, "reference")
    holds = _holds(*aucs, lambda a, b: abs(a - b) <= tolerances.auc)
    before = main_auc(report, "original")
    # a model that fails on the forget set differs from one that never saw it, and may
    beyond = "beyond what the goal asks: " if report.goal == "erased" else ""
    checks.append(_check("MIA AUC", f"{beyond}equal to the reference's", *aucs, tolerances.auc, holds, before))
    holds = _holds(distance, 0.0, lambda a, _: a <= tolerances.distance)
    against = None if distance is None else 0.0
    rule = f"{beyond}losses distributed as the reference's"
    before = report.distances.get("original", {}).get("forget")
    checks.append(_check("KS distance of forget losses", rule, distance, against, tolerances.distance, holds, before))
    for attack in attacks:
        if attack in report.relearning:
            checks.append(_relearning_check(report, goodness, attack, tolerances.relearning))
            continue
        name = f"forget {goodness.name} after {attack}"
        if report.goal == "erased":
            attacked = report.models.get(f"unlearned, {attack}", {})
            checks.append(_erased_check(goodness, tolerances, name, goodness(attacked, "forget")))
            continue
        rule = "the forget set no better than the reference's after the same"
        pair = tuple(
            goodness(report.models.get(f"{who}, {attack}", {}), "forget") for who in ("unlearned", "reference")
        )
        holds = _holds(*pair, lambda a, b: a - b <= tolerances.quality)
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

    def check(
        self,
        name: str,
        rule: str,
        value: float | None,
        compared_with: float | None,
        tolerance: float,
        holds: bool | None,
        before: float | None = None,
    ) -> Check:
        """With the metric's own sign."""
        signed = [None if one is None else self.sign * one for one in (value, compared_with, before)]
        return _check(name, rule, *signed[:2], tolerance, holds, signed[2])


def _forget_check(report: UnlearningReport, goodness: _Goodness, tolerances: Tolerances, of: str) -> Check:
    value, name = goodness(report.models["unlearned"], of), f"{of} {goodness.name}"
    before = goodness(report.models.get("original", {}), of)
    if report.goal == "retrained":
        reference = goodness(report.models.get("reference", {}), of)
        holds = _holds(value, reference, lambda a, b: abs(a - b) <= tolerances.quality)
        return goodness.check(name, "equal to the reference's", value, reference, tolerances.quality, holds, before)
    return _erased_check(goodness, tolerances, name, value, before)


def _erased_check(
    goodness: "_Goodness", tolerances: Tolerances, name: str, value: float | None, before: float | None = None
) -> Check:
    """Whether a model fails on the forget set."""
    if goodness.name == "loss":  # no level of a loss means failure
        return goodness.check(name, "failed on", value, None, 0.0, None, before)
    level = tolerances.erased if goodness.sign > 0 else tolerances.erased - 1
    rule = "at most this" if goodness.sign > 0 else "at least this"
    return goodness.check(name, rule, value, level, 0.0, None if value is None else value <= level, before)


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


def _check(name: str, rule: str, value, compared_with, tolerance: float, holds: bool | None, before=None) -> Check:
    within = f" within {tolerance:g}" if tolerance else ""
    return Check(name, rule + within, value, compared_with, tolerance, holds, before)


def main_auc(report: UnlearningReport, model: str) -> float | None:
    """AUC against the best non-members that were measured."""
    found = report.membership.get(model, {})
    return next((found[name].auc for name in NONMEMBERS if name in found), None)


# ---- Numbers that sum up a run: each hides something, read them beside what they are made of ----


def tug_of_war(unlearned: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """Tug of war (arXiv 2406.01257): `(1 - |gap_forget|) (1 - |gap_retain|) (1 - |gap_test|)`; 1 is best.

    A gap is the difference to the retrained model, in [0, 1]; rates above 1 count as 1.

    Args:
        unlearned, retrained (`Mapping[str, float]`): A rate in [0, 1], accuracy or error, on "forget", "retain", "test".
    """
    product = 1.0
    for name in ("forget", "retain", "test"):
        product *= 1 - abs(min(unlearned[name], 1.0) - min(retrained[name], 1.0))
    return product


def unlearning_impact_score(original_test: float, test: float, forget: float, *, erased: bool) -> float:
    """UIS (arXiv 2503.02312); lower is better.

    O and T are the test accuracy of the original and of the unlearned model, F is the accuracy on the forget set. It
    is `(|O - T| / O + |O - F| / O) / 2` where forgotten samples are to be as unseen ones are. It is `(|O - T| / O + F
    / O) / 2` where they are to be got wrong.

    Args:
        original_test, test, forget (`float`): O, T and F; for an error rate, 1 minus the rate.
        erased (`bool`): Whether the second form is meant.

    Raises:
        ValueError: O is 0.
    """
    if original_test <= 0:
        raise ValueError(
            f"`original_test` must be positive, but is {original_test}: the original model knows nothing."
        )
    missed = forget if erased else abs(original_test - forget)
    return (abs(original_test - test) / original_test + missed / original_test) / 2


def average_gap(unlearned: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """The mean absolute difference to the retrained model over the quantities both have; 0 is best.

    As in the tables of SalUn (arXiv 2310.12508), which average it over accuracy on the forget set, the retain set, the
    test set and membership inference.

    Raises:
        ValueError: They have no quantity in common.
    """
    shared = [name for name in unlearned if name in retrained]
    if not shared:
        raise ValueError(
            f"`unlearned` has {sorted(unlearned)} and `retrained` {sorted(retrained)}: nothing in common."
        )
    return sum(abs(unlearned[name] - retrained[name]) for name in shared) / len(shared)
