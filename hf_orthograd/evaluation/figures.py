"""Figures of a run: what its steps did to the losses, and what it did to each set."""

from collections.abc import Mapping
from pathlib import Path


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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    losses, bars = figure.subplots(1, 2)
    for number, (method, history) in enumerate(histories.items()):
        for name, style in (("forget", "-"), ("retain", "--")):
            points = [(entry["step"], entry[f"{name}_loss"]) for entry in history if f"{name}_loss" in entry]
            if points:
                steps, values = zip(*points, strict=True)
                losses.plot(steps, values, style, color=f"C{number + 1}", label=f"{name}, {method}")
    losses.set(xlabel="step", ylabel="mean loss of the step's samples (nats)", title="Losses while unlearning")
    losses.legend(fontsize="small")
    width = 0.8 / len(qualities)
    for number, (method, values) in enumerate(qualities.items()):
        positions = [index + (number + 0.5) * width - 0.4 for index in range(len(values))]
        drawn = bars.bar(positions, list(values.values()), width=width, label=method, color=f"C{number}")
        bars.bar_label(drawn, fmt="%.0f", fontsize="x-small")
    bars.set_xticks(range(len(values)), [name.replace(", ", ",\n") for name in values])
    bars.set(ylabel=metric, title="Before and after")
    bars.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def plot_report(report, folder: str | Path) -> list[Path]:
    """Draws what an [`UnlearningReport`] holds, and leaves out the figures for which it holds nothing.

    `tradeoff.png`: losses of the forget set against the retained over the run. `losses.png`: histograms of per-sample
    losses. `relearning.png`: quality of the forget set under each relearning attack. `cost.png`: time and memory.

    Returns:
        The files written.
    """
    drawn = {
        "tradeoff.png": _draw_tradeoff,
        "losses.png": _draw_losses,
        "relearning.png": _draw_relearning,
        "cost.png": _draw_costs,
    }
    written = []
    for name, draw in drawn.items():
        figure = draw(report)
        if figure is not None:
            written.append(Path(folder) / name)
            figure.savefig(written[-1], dpi=110)
    return written


def _new_figure(panels: int):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * panels, 4), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _draw_tradeoff(report):
    pairs = (("eval_forget_loss", "eval_retain_loss"), ("forget_loss", "retain_loss"))
    for keys in pairs:  # whole sets where the run evaluated them, or the samples of its steps
        points = [tuple(entry[key] for key in keys) for entry in report.history if all(key in entry for key in keys)]
        if points:
            break
    else:
        return None
    figure, (axes,) = _new_figure(1)
    axes.plot(*zip(*points, strict=True), ".-", color="C0", label="while unlearning")
    for number, model in enumerate(("original", "unlearned", "reference")):
        sets = report.models.get(model, {})
        if "retain" in sets:
            axes.plot(
                sets["forget"].loss, sets["retain"].loss, "*", color=f"C{number + 1}", markersize=13, label=model
            )
    axes.set(xlabel="forget loss (nats)", ylabel="retain loss (nats)", title="What forgetting cost")
    axes.legend(fontsize="small")
    return figure


def _draw_losses(report):
    import numpy as np

    if not report.losses:
        return None
    figure, panels = _new_figure(len(report.losses))
    everything = np.concatenate([losses for sets in report.losses.values() for losses in sets.values()])
    top = np.quantile(everything[np.isfinite(everything)], 0.99)
    edges = np.linspace(0, max(float(top), 1e-6), 30)
    for axes, (model, sets) in zip(panels, report.losses.items(), strict=True):
        for number, name in enumerate(("forget", "forget_unseen", "test")):
            if name in sets:
                weights = np.full(len(sets[name]), 1 / len(sets[name]))
                values = np.clip(sets[name], 0, edges[-1])  # the last bin holds all beyond
                axes.hist(values, edges, weights=weights, histtype="step", color=f"C{number}", label=name)
        axes.set(xlabel="loss of a sample (nats)", ylabel="share of samples", title=model)
        axes.legend(fontsize="small")
    return figure


def _draw_relearning(report):
    if not report.relearning:
        return None
    figure, panels = _new_figure(len(report.relearning))
    for axes, (attack, curves) in zip(panels, report.relearning.items(), strict=True):
        for model, curve in curves.items():
            values = [point.loss if point.value is None else point.value for point in curve]
            axes.plot([point.step for point in curve], values, ".-", label=model)
        axes.set(xlabel="step of the attack", ylabel=f"forget {report.metric or 'loss (nats)'}", title=attack)
        axes.legend(fontsize="small")
    return figure


def _draw_costs(report):
    names = [name for name in ("seconds", "peak_memory_gib") if any(cost.get(name) for cost in report.cost.values())]
    if not names:
        return None
    figure, panels = _new_figure(len(names))
    for axes, name in zip(panels, names, strict=True):
        known = {what: cost[name] for what, cost in report.cost.items() if cost.get(name)}
        axes.bar_label(axes.bar(list(known), list(known.values())), fmt="%.3g")
        axes.set(ylabel={"seconds": "time (s)", "peak_memory_gib": "peak memory (GiB)"}[name])
    return figure
