"""From a study's records to its tables and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from harness import machine_note
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from methods import METHODS
from scipy import stats

from hf_orthograd.evaluation import average_gap, loss_distance


def rates(record: Mapping, test: str = "test") -> dict[str, float]:
    """What the average gap is taken over: the metric on forget, retain and test sets, and the AUC of forget against test."""
    found = {name: min(record["quality"][name][0], 1.0) for name in ("forget", "retain")}
    return found | {"test": min(record["quality"][test][0], 1.0), "auc": record["auc"][test]}


def gap(record: Mapping, reference: Mapping, test: str = "test") -> float:
    return average_gap(rates(record, test), rates(reference, test))


def choose(runs: Mapping[float, Mapping], reference: Mapping) -> float:
    """The setting with the smallest average gap to the retrained model, validation data in place of test data."""
    finite = {setting: record for setting, record in runs.items() if record["failed"] is None}
    return min(finite, key=lambda setting: gap(finite[setting], reference, "validation"))


def recovery(record: Mapping, original: Mapping, reference: Mapping, better: int) -> float | None:
    """The first watched step of relearning at which half of what a retrained model lacks on the forget set was back."""
    half = (original["quality"]["forget"][0] + reference["quality"]["forget"][0]) / 2
    steps = [step for step, value, _ in record["relearning"] if better * (value - half) >= 0]
    return steps[0] if steps else None


def mean_and_interval(values: Sequence[float]) -> str:
    """The mean and the half-width of its 95 % interval by Student's t over the seeds."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{mean:.3f} ± {half:.3f}"


COLUMNS = (
    "forget",
    "at hand",
    "retain",
    "test",
    "MIA AUC",
    "KS",
    "gap",
    "relearn steps",
    "int8 forget",
    "int4 forget",
)


RIVAL = "scrub"  # the method whose gaps the others' are compared with, by pairs


def cells(records: list[Mapping], originals: list[Mapping], references: list[Mapping], better: int) -> list[str]:
    """One row of the main table from its runs, one for each seed."""

    def over(function) -> str:
        values = [function(*three) for three in zip(records, originals, references, strict=True)]
        return mean_and_interval(values) if None not in values else "not measured"

    def relearned() -> str:
        steps = [recovery(*three, better) for three in zip(records, originals, references, strict=True)]
        last = records[0]["relearning"][-1][0]
        return ", ".join(f"> {last}" if step is None else str(step) for step in steps)

    row = [over(lambda record, *_: record["quality"]["forget"][0])]
    row += [over(lambda record, *_: record["quality"].get("at_hand", [None])[0])]
    row += [over(lambda record, *_, name=name: record["quality"][name][0]) for name in ("retain", "test")]
    row += [over(lambda record, *_: record["auc"]["test"])]
    row += [over(_distance), over(lambda record, _, reference: gap(record, reference))]
    row += [relearned() if "relearning" in records[0] else "not measured"]
    missing = {"forget": [None]}
    return row + [
        over(lambda record, *_, bits=bits: record.get(bits, missing)["forget"][0]) for bits in ("int8", "int4")
    ]


def _distance(record: Mapping, _, reference: Mapping) -> float:
    return record["ks"] if "ks" in record else loss_distance(record["forget_losses"], reference["forget_losses"])


def peaks_of(runs: Mapping[str, Mapping], labels: Mapping[str, str]) -> dict[str, float]:
    """Peak memory in GiB by label, of those for which it was measured."""
    measured = {label: runs.get(f"memory {name}") for name, label in labels.items()}
    return {label: one["peak_memory_gib"] for label, one in measured.items() if one is not None}


def to_markdown(
    rows: Mapping[str, tuple[list[str], list[Mapping] | None]],
    columns: Sequence[str],
    peaks: Mapping[str, float],
) -> str:
    """A table of rows of cells, with what each method's runs took: median time, peak memory, steps, setting."""
    head = ["method", *columns, "time (s)", "memory (GiB)", "steps", "setting"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for label, (row, records) in rows.items():
        cost = [""] * 4
        if records is not None:
            cost = [f"{np.median([record['seconds'] for record in records]):.1f}"]
            cost += [f"{peaks[label]:.2f}" if label in peaks else "not measured"]
            cost += [", ".join(str(record["steps"]) for record in records), f"{records[0]['setting']:g}"]
        lines.append("| " + " | ".join([label, *row, *cost]) + " |")
    return "\n".join(lines)


def write_report(
    runs: Mapping[str, Mapping], path: Path, kind: str, seeds: Sequence[int], sizes: Sequence[str], better: int
) -> None:
    """Writes the tables of one kind of request as Markdown, and a plot of gap over retain size.

    Args:
        seeds (`Sequence[int]`): Those for which any method was run; a method that lacks one of them is left out.
        better (`int`): 1 if more of the metric is better, else -1.
    """
    originals, references = ([runs[f"{what} {kind}-{seed}"] for seed in seeds] for what in ("original", "retrained"))
    parts, gaps = [], {}
    peaks = peaks_of(runs, {name: method.label for name, method in METHODS.items()})
    columns = (*COLUMNS, f"gap less that of {METHODS[RIVAL].label}")
    for size in sizes:
        found = {name: [runs.get(f"final {kind}-{seed} {size} {name}") for seed in seeds] for name in METHODS}
        found = {name: records for name, records in found.items() if None not in records}
        if not found:
            continue
        rows = {
            what: ([*cells(records, originals, references, better), ""], None)
            for what, records in (("original", originals), ("retrained", references))
        }
        for name, records in found.items():
            gaps.setdefault(name, {})[size] = [gap(*pair) for pair in zip(records, references, strict=True)]
        for name, records in found.items():
            apart = ""
            if name != RIVAL and size in gaps.get(RIVAL, {}):
                apart = mean_and_interval(np.subtract(gaps[name][size], gaps[RIVAL][size]))
            rows[METHODS[name].label] = ([*cells(records, originals, references, better), apart], records)
        what = "a proxy retain set" if size == "proxy" else f"{float(size):.0%} of the retain set at hand"
        parts.append(f"## {what}\n\n{to_markdown(rows, columns, peaks)}")
    counted = f"means over {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    path.with_suffix(".md").write_text(f"# {kind}: {counted}\n\n" + "\n\n".join([*parts, machine_note()]) + "\n")
    _plot(gaps, sizes, path.with_suffix(".png"), kind)


def plot_means(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """For each quantity a panel of bars, one for each label: the mean of its values, and a point for each of them."""
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for axes, (quantity, values) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        _draw_means(axes, values)
        axes.set(xlabel=quantity)
    figure.savefig(path, dpi=90)


def _draw_means(axes: Axes, values: Mapping[str, Sequence[float]]) -> None:
    axes.barh(list(values), [np.mean(one) for one in values.values()], color="C0")
    for place, one in enumerate(values.values()):
        axes.plot(one, [place] * len(one), "k.")
    axes.invert_yaxis()


def _plot(gaps: Mapping[str, Mapping[str, list[float]]], sizes: Sequence[str], path: Path, kind: str) -> None:
    """Bars of the first size's gaps with a point for each seed, and, if there are more sizes, gaps over size."""
    by_size = {size: {name: one[size] for name, one in gaps.items() if size in one} for size in sizes}
    by_size = {size: found for size, found in by_size.items() if found}
    figure = Figure(figsize=(6 * (1 + (len(by_size) > 1)), 4), layout="constrained")
    panels = figure.subplots(1, 1 + (len(by_size) > 1), squeeze=False)[0]
    first = sorted(by_size[sizes[0]].items(), key=lambda item: np.mean(item[1]))
    _draw_means(panels[0], {METHODS[name].label: values for name, values in first})
    panels[0].set(
        xlabel="average gap to the retrained model", title=f"{kind}, {float(sizes[0]):.0%} retain data at hand"
    )
    if len(by_size) > 1:
        shown = sorted(by_size, key=lambda size: float("inf") if size == "proxy" else float(size))
        for name, one in gaps.items():
            places = [place for place, size in enumerate(shown) if size in one]
            if len(places) > 1:
                means = [np.mean(one[shown[place]]) for place in places]
                panels[1].plot(places, means, ".-", label=METHODS[name].label)
        panels[1].set_xticks(range(len(shown)), [size if size == "proxy" else f"{float(size):.0%}" for size in shown])
        panels[1].set(xlabel="retain data at hand", ylabel="average gap to the retrained model")
        panels[1].legend(fontsize="x-small")
    figure.savefig(path, dpi=90)
