"""Quality on a set of data, sample by sample, so that it has an interval and a value for each group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats


@dataclass
class Rate:
    """A metric's value and its 95 % interval, as in [`Quality`]."""

    value: float
    interval: tuple[float, float] | None


@dataclass
class Quality:
    """What a model does on one set of data.

    Attributes:
        loss (`float`): Mean over samples of the per-sample loss, in nats.
        size (`int`): Number of samples.
        value (`float`, *optional*): The metric.
        interval (`tuple[float, float]`, *optional*): Its 95 % interval by the percentile bootstrap over samples.
        groups (`dict[str, float]`, *optional*): The metric in each group, a speaker or a class, say.
        worst_group (`str`, *optional*): The group where it is worst.
        further (`dict[str, Rate]`): Metrics that are reported beside it, by name.
    """

    loss: float
    size: int
    value: float | None = None
    interval: tuple[float, float] | None = None
    groups: dict[str, float] | None = None
    worst_group: str | None = None
    further: dict[str, Rate] = field(default_factory=dict)


def summarize(
    losses: np.ndarray,
    counts: tuple[np.ndarray, np.ndarray] | None,
    *,
    greater_is_better: bool = True,
    groups: Sequence | None = None,
    further: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    seed: int = 0,
) -> Quality:
    """Summarises one set's per-sample losses (n,) and, where metrics were measured, their counts, (n,) each."""
    quality = Quality(loss=float(np.mean(losses)), size=len(losses))
    for name, others in (further or {}).items():
        quality.further[name] = Rate(_ratio(*others), bootstrap_interval(*others, seed=seed))
    if counts is None:
        return quality
    quality.value, quality.interval = _ratio(*counts), bootstrap_interval(*counts, seed=seed)
    if groups is not None:
        numerators, denominators = counts
        keys = np.array([str(group) for group in groups])
        quality.groups = {
            str(key): _ratio(numerators[keys == key], denominators[keys == key]) for key in np.unique(keys)
        }
        worst = min if greater_is_better else max
        quality.worst_group = worst(quality.groups, key=quality.groups.get)
    return quality


def bootstrap_interval(
    numerators: np.ndarray, denominators: np.ndarray, *, seed: int = 0, resamples: int = 1000
) -> tuple[float, float] | None:
    """The 95 % percentile interval of `sum(numerators) / sum(denominators)` under resampling of samples.

    None for fewer than two samples, of which nothing can be said.
    """
    if len(numerators) < 2:
        return None
    found = stats.bootstrap(
        (numerators, denominators),
        _ratio,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, 1_000_000 // len(numerators)),  # all at once, they take 23 kB of memory a sample
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _ratio(numerators: np.ndarray, denominators: np.ndarray, axis: int = -1):
    ratio = numerators.sum(axis=axis) / denominators.sum(axis=axis)
    return float(ratio) if ratio.ndim == 0 else ratio
