"""From the records of the study of text to its table and plot."""

from pathlib import Path

import numpy as np
from harness import machine_note
from matplotlib.figure import Figure
from tables import mean_and_interval

from hf_orthograd.evaluation.text import forget_quality


COLUMNS = (
    "forget quality (p)", "utility", "utility less the default's", "forget probability", "forget ROUGE-L",
    "forget truth ratio", "forget loss", "extraction", "retain ROUGE-L", "retain ROUGE-L less the default's",
    "retain probability", "retain probability less the default's", "learning rate", "steps",
    "seconds a step, evaluations included", "peak memory (GiB)",
)  # fmt: skip


def write_report(study, path: Path) -> None:
    """Of each way of training the variants that were run for the same requests as the default; and a plot of both numbers."""
    runs, parts, panels = (
        study.records.runs,
        [f"# Forgetting {study.forgotten} of {study.authors} invented authors", study.note],
        {},
    )
    for train, title in study.trained.items():
        found = {
            variant: [runs.get(f"{variant}, {train}, {study.request(seed)}") for seed in type(study).seeds]
            for variant in study.choices
        }
        done = [number for number, record in enumerate(found[study.default]) if record is not None]
        if not done:
            continue
        models = {
            what: [runs[f"{what}, {study.request(type(study).seeds[number])}"] for number in done]
            for what in ("original", "retrained")
        }
        for one, other in zip(models["original"], models["retrained"], strict=True):
            one["quality"] = forget_quality(np.array(one["truth_ratios"]), np.array(other["truth_ratios"]))
            other["quality"] = 1.0
        methods = {variant: [own[number] for number in done] for variant, own in found.items()}
        methods = {variant: own for variant, own in methods.items() if None not in own}
        title = f"{title}, {len(done)} requests"
        parts.append(f"## {title}\n\n{_table(models | methods, methods[study.default])}")
        panels[title] = models | methods
    path.with_suffix(".md").write_text("\n\n".join([*parts, machine_note()]) + "\n")
    _plot(panels, path.with_suffix(".png"))


def _table(rows: dict[str, list[dict]], default: list[dict]) -> str:
    lines = ["| " + " | ".join(["method", *COLUMNS]) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, own in rows.items():
        difference = [one["utility"] - other["utility"] for one, other in zip(own, default, strict=True)]
        cells = [", ".join(f"{record['quality']:.2g}" for record in own)]
        cells += [mean_and_interval([record["utility"] for record in own])]
        cells += ["" if own is default or "steps" not in own[0] else mean_and_interval(difference)]
        cells += [
            mean_and_interval([record["sets"]["forget"][key] for record in own]) for key in ("probability", "rouge")
        ]
        cells += [mean_and_interval([np.mean(record["truth_ratios"]) for record in own])]
        cells += [mean_and_interval([record["forget_loss"] for record in own])]
        cells += [mean_and_interval([record["extraction"] for record in own])]
        for key in ("rouge", "probability"):
            values, others = ([record["sets"]["retain"][key] for record in rows] for rows in (own, default))
            less = "" if own is default or "steps" not in own[0] else mean_and_interval(np.subtract(values, others))
            cells += [mean_and_interval(values), less]
        if "steps" in own[0]:
            cells += [", ".join(sorted({f"{record['rate']:g}" for record in own}))]
            cells += [", ".join(str(record["steps"]) for record in own)]
            cells += [f"{np.median([record['seconds'] / record['steps'] for record in own]):.2f}"]
            peaks = [record["memory"] / 2**30 for record in own if "memory" in record]
            cells += [f"{np.median(peaks):.1f}" if peaks else ""]
        else:
            cells += ["", "", "", ""]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def _plot(panels: dict[str, dict[str, list[dict]]], path: Path) -> None:
    """Utility over forget quality: the upper right corner is best."""
    figure = Figure(figsize=(7 * max(1, len(panels)), 5), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, (name, own) in enumerate(rows.items()):
            quality, utility = ([record[key] for record in own] for key in ("quality", "utility"))
            axes.plot(quality, utility, "osD^v<>phX*P"[number % 12], label=name)
        axes.axvline(0.05, color="gray", linestyle=":")
        axes.set(xscale="log", xlabel="forget quality (p-value)", ylabel="model utility", title=title)
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=90)
