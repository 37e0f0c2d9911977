"""Figures of a run: what its steps did to the losses, and what it did to each set.

One palette for all, that of Okabe and Ito, whose colours stay apart for the colour-blind; a line is told by its style, too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike


if TYPE_CHECKING:
    from .report import UnlearningReport


BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
MODELS = {"original": (ORANGE, ":", "o"), "unlearned": (BLUE, "-", "s"), "reference": (GREEN, "--", "D")}
SETS = {"forget": (RED, "-"), "forget_unseen": (PURPLE, "--"), "test": (SKY, ":")}
WIDTH = 4.8  # inches of a panel: at this width its letters can be read on a phone
MOST_GROUPS, LONGEST_NAME = 12, 24
PLAIN = {"text.parse_math": False}  # a name with a dollar sign is no formula


def plot_unlearning(
    histories: Mapping[str, list[dict]], qualities: Mapping[str, Mapping[str, float]], metric: str, path: str | Path
) -> None:
    """Draws losses over steps beside a bar of the metric for each set and method, and saves the figure.

    Args:
        histories (`Mapping`): For each method, the trainer's log entries that hold `step`, `forget_loss` and, where the
            update used retain samples, `retain_loss`.
        qualities (`Mapping`): For each method (and "before", say), the metric on each named set.
        metric (`str`): What the bars show, with its unit.
        path (`str` or `Path`): Of the image; its ending gives the format.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(PLAIN):
        figure = Figure(figsize=(2.3 * WIDTH, 4), layout="constrained")
        _draw_run(*figure.subplots(1, 2), histories, qualities, metric)
        figure.savefig(path, dpi=110)


def _draw_run(losses, bars, histories: Mapping, qualities: Mapping, metric: str) -> None:
    colours = {method: PALETTE[number % len(PALETTE)] for number, method in enumerate(qualities)}
    for method, history in histories.items():
        for name, style in (("forget", "-"), ("retain", "--")):
            points = [(entry["step"], entry[f"{name}_loss"]) for entry in history if f"{name}_loss" in entry]
            if points:
                steps, values = zip(*points, strict=True)
                losses.plot(steps, smooth(values), style, color=colours[method], label=f"{name}, {method}")
    losses.set(xlabel="step", ylabel="mean loss of the step's samples (nats)", title="Losses while unlearning")
    if losses.lines:
        losses.legend(fontsize="small", frameon=False)
    width = 0.8 / len(qualities)
    for number, (method, values) in enumerate(qualities.items()):
        positions = [index + (number + 0.5) * width - 0.4 for index in range(len(values))]
        drawn = bars.bar(positions, list(values.values()), width=width, label=method, color=colours[method])
        bars.bar_label(drawn, fmt="%.0f", fontsize="small")
    bars.set_xticks(range(len(values)), [name.replace(", ", ",\n") for name in values])
    bars.set(ylabel=metric, title="Before and after")
    bars.legend(fontsize="small", frameon=False)


def plot_report(report: "UnlearningReport", folder: str | Path) -> list[Path]:
    """Saves each figure of `draw_report` as an image.

    Returns:
        The files written.
    """
    from matplotlib import rc_context

    written = []
    with rc_context(PLAIN):
        for name, figure in draw_report(report).items():
            written.append(Path(folder) / f"{name}.png")
            figure.savefig(written[-1], dpi=150)
    return written


def draw_report(report: "UnlearningReport") -> dict:
    """Draws what an [`UnlearningReport`] holds, and leaves out the figures for which it holds nothing.

    Returns:
        `dict[str, Figure]`: "tradeoff", losses of the forget and the retained samples over the run; "losses", histograms of
        per-sample losses; "groups", the groups whose metric changed for the worse by most; "relearning", quality of the
        forget set under each relearning attack; "cost", time and memory.
    """
    from matplotlib import rc_context

    with rc_context(PLAIN):
        drawn = {
            "tradeoff": _draw_tradeoff(report),
            "losses": _draw_losses(report),
            "groups": _draw_groups(report),
            "relearning": _draw_relearning(report),
            "cost": _draw_costs(report),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def smooth(values: ArrayLike, window: int | None = None) -> np.ndarray:
    """The mean over a window around each value, (n,), shorter at both ends; by default of a tenth of the values."""
    values = np.asarray(values, dtype=float)
    half = (max(1, len(values) // 10) if window is None else window) // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _new_figure(panels: int, height: float, **shared):
    """Panels below each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height * panels + 0.3), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False, **shared)[:, 0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_tradeoff(report):
    sides = ("forget", "retain")
    for prefix in ("eval_", ""):  # whole sets where the run evaluated them, or the samples of its steps
        lines = {
            side: [
                (entry["step"], entry[f"{prefix}{side}_loss"])
                for entry in report.history
                if f"{prefix}{side}_loss" in entry and "step" in entry
            ]
            for side in sides
        }
        if all(len(points) > 1 for points in lines.values()):
            break
    else:
        return None
    figure, panels = _new_figure(2, 1.7, sharex=True)
    for axes, side in zip(panels, sides, strict=True):
        steps, values = zip(*lines[side], strict=True)
        if not prefix:  # a step's few samples jump about
            axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
        axes.plot(steps, values if prefix else smooth(values), color=BLUE, label="while unlearning")
        for model in ("original", "reference"):
            if side in report.models.get(model, {}):
                colour, style, _ = MODELS[model]
                axes.axhline(report.models[model][side].loss, color=colour, linestyle=style, label=model)
        axes.set(ylabel=f"{side} loss (nats)")
    panels[0].legend(fontsize="small", frameon=False)
    panels[-1].set(xlabel="step")
    return figure


def _draw_losses(report):
    models = [model for model in MODELS if report.losses.get(model)]
    everything = [losses for model in models for losses in report.losses[model].values()]
    finite = np.concatenate([np.zeros(0), *everything])
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return None
    figure, panels = _new_figure(len(models), 1.4, sharex=True)
    top = np.quantile(finite, 0.99)
    edges = np.linspace(0, max(float(top), 1e-6), 30)
    for axes, model in zip(panels, models, strict=True):
        for name, (colour, style) in SETS.items():
            losses = report.losses[model].get(name)
            if losses is not None:
                weights = np.full(len(losses), 100 / len(losses))
                values = np.clip(np.nan_to_num(losses, nan=np.inf), 0, edges[-1])  # the last bin holds all beyond
                kind = {"histtype": "step", "linewidth": 1.5, "linestyle": style}
                axes.hist(values, edges, weights=weights, color=colour, label=name.replace("_", ", "), **kind)
        axes.set(ylabel="samples (%)", title=model)
    panels[0].legend(fontsize="small", frameon=False)
    panels[-1].set(xlabel="loss of a sample (nats)")
    return figure


def _draw_groups(report):
    models = [model for model in MODELS if report.models.get(model, {}).get("test") is not None]
    groups = {model: report.models[model]["test"].groups for model in models}
    if not groups.get("original") or not groups.get("unlearned"):
        return None
    sign = -1 if report.greater_is_better else 1
    shared = [name for name in groups["original"] if all(name in found for found in groups.values() if found)]
    harm = {name: sign * (groups["unlearned"][name] - groups["original"][name]) for name in shared}
    names = sorted(harm, key=harm.get)[-MOST_GROUPS:]
    if not names:
        return None
    shown = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in names]
    figure, (axes,) = _new_figure(1, 0.9 + 0.22 * len(names))
    for model in models:
        if groups[model]:
            colour, _, marker = MODELS[model]
            axes.plot(
                [groups[model][name] for name in names],
                range(len(names)),
                marker,
                color=colour,
                label=model,
                alpha=0.8,
            )
    axes.set_yticks(range(len(names)), shown)
    axes.set(xlabel=f"{report.metric} on unseen samples, the worst hit on top")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def _draw_relearning(report):
    if not report.relearning:
        return None
    figure, panels = _new_figure(len(report.relearning), 2.2)
    for axes, (attack, curves) in zip(panels, report.relearning.items(), strict=True):
        for model, curve in curves.items():
            values = [point.loss if point.value is None else point.value for point in curve]
            colour, style, marker = MODELS[model]
            axes.plot([point.step for point in curve], values, style + marker, color=colour, label=model)
        axes.set(xlabel="step of the attack", ylabel=f"forget {report.metric or 'loss (nats)'}", title=attack)
        axes.legend(fontsize="small", frameon=False)
    return figure


def _draw_costs(report):
    names = [name for name in ("seconds", "peak_memory_gib") if any(cost.get(name) for cost in report.cost.values())]
    if not names:
        return None
    figure, panels = _new_figure(len(names), 0.9 + 0.3 * len(report.cost))
    for axes, name in zip(panels, names, strict=True):
        known = {what: cost[name] for what, cost in report.cost.items() if cost.get(name)}
        bars = axes.barh(list(known), list(known.values()), color=BLUE, height=0.4)
        axes.bar_label(bars, fmt="%.3g", padding=3)
        axes.margins(x=0.15)
        axes.set(xlabel={"seconds": "time (s)", "peak_memory_gib": "peak memory (GiB)"}[name])
    return figure
