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
