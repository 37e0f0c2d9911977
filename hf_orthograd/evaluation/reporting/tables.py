"""What an [`UnlearningReport`] holds as tables, for its Markdown edition and its page."""

from typing import TYPE_CHECKING

from ..quality import Quality, Rate


if TYPE_CHECKING:
    from .report import UnlearningReport


NOT_MEASURED = "not measured"
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # head and rows


def report_as_markdown(report: "UnlearningReport", audience: str, goal: str) -> str:
    """All tables, under headings."""
    hit = [
        f"Hardest hit group of {name}: {one.group}, from {one.before:.3f} to {one.after:.3f}."
        for name, one in report.hardest_hit.items()
    ]
    quality = [f"({quality_note(report)})", _markdown(quality_table(report)), *worst_groups(report), *hit]
    parts = [
        f"({audience})\n\n# Unlearning report\n\nGoal: {goal}" + f"\n\nMade: {report.made}." * bool(report.made),
        "## What holds\n\n" + _markdown(checks_table(report)),
        "## Quality\n\n" + "\n\n".join(quality),
        "## Privacy\n\n" + _markdown(membership_table(report)) + "\n\n" + _markdown(distances_table(report)),
        "## Relearning\n\n" + _markdown(relearning_table(report)),
        "## Summary and cost\n\n" + _markdown(summary_table(report)),
    ]
    if report.settings:
        parts.append("## Run\n\n" + _markdown(settings_table(report)))
    return "\n\n".join(parts)


def show(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.4g}"


def checks_table(report: "UnlearningReport") -> Table:
    words = {True: "yes", False: "no", None: NOT_MEASURED}
    rows = [
        (
            check.name,
            "" if check.before is None else show(check.before),
            show(check.value),
            show(check.compared_with),
            check.rule,
            words[check.holds],
        )
        for check in report.checks
    ]
    return ("quantity", "before", "unlearned", "compared with", "rule", "holds"), rows


def quality_note(report: "UnlearningReport") -> str:
    return f"{report.metric} with its 95 % interval, and the mean loss in nats" if report.metric else "mean loss, nats"


def quality_table(report: "UnlearningReport") -> Table:
    names = set_sizes(report)
    rows = [
        (model, *(", ".join(quality_lines(sets[name])) if name in sets else NOT_MEASURED for name in names))
        for model, sets in report.models.items()
    ]
    return ("model", *(f"{name} ({size} samples)" for name, size in names.items())), rows


def set_sizes(report: "UnlearningReport") -> dict[str, int]:
    """How many samples each set has that was measured."""
    return {name: one.size for sets in report.models.values() for name, one in sets.items()}


def worst_groups(report: "UnlearningReport") -> list[str]:
    """A sentence for each set of retained samples."""
    return [
        f"Worst group of {model} on {name}: {quality.worst_group}, {quality.groups[quality.worst_group]:.3f}."
        for model, sets in report.models.items()
        for name, quality in sets.items()
        if quality.worst_group is not None and name in ("retain", "test") and model in ("unlearned", "reference")
    ]


def membership_table(report: "UnlearningReport") -> Table:
    rows = [
        (
            model,
            against,
            show(found.auc),
            show(found.tpr_at_1_percent_fpr),
            f"{found.num_members} / {found.num_nonmembers}",
        )
        for model, sets in report.membership.items()
        for against, found in sets.items()
    ]
    return ("model", "forget set against", "MIA AUC", "TPR at 1 % FPR", "members / others"), rows


def distances_table(report: "UnlearningReport") -> Table:
    rows = [(model, name, show(value)) for model, sets in report.distances.items() for name, value in sets.items()]
    return ("model", "set", "KS distance of losses to the reference"), rows


def relearning_table(report: "UnlearningReport") -> Table:
    rows = []
    for attack, curves in report.relearning.items():
        for model, curve in curves.items():
            values = " ".join(
                f"{point.step}: {show(point.loss if point.value is None else point.value)}" for point in curve
            )
            recovery = report.recovery_steps.get(attack, {})
            steps = NOT_MEASURED
            if model in recovery:
                steps = f"> {curve[-1].step}" if recovery[model] is None else str(recovery[model])
            rows.append((attack, model, values, steps))
    return ("attack", "model", f"forget {report.metric or 'loss'} by step", "steps until half is back"), rows


def summary_table(report: "UnlearningReport") -> Table:
    rows = [(name, show(value)) for name, value in report.summary.items()]
    for what, cost in report.cost.items():
        rows += [(f"{what}, {name}", show(value)) for name, value in cost.items()]
    return ("quantity", "value"), rows


def settings_table(report: "UnlearningReport") -> Table:
    return ("setting", "value"), [
        (
            name.replace("_", " "),
            show(value) if isinstance(value, float) else NOT_MEASURED if value is None else str(value),
        )
        for name, value in report.settings.items()
    ]


def quality_lines(quality: Quality) -> list[str]:
    """The metric, further ones and the loss."""
    rates = {} if quality.value is None else {"": Rate(quality.value, quality.interval)}
    shown = [f"{name} {_show_rate(rate)}".strip() for name, rate in {**rates, **quality.further}.items()]
    return [*shown, f"{quality.loss:.3f}"]


def _show_rate(rate: Rate) -> str:
    interval = "" if rate.interval is None else f" [{rate.interval[0]:.3f}, {rate.interval[1]:.3f}]"
    return f"{rate.value:.3f}{interval}"


def _markdown(table: Table) -> str:
    head, rows = table
    if not rows:
        return f"{', '.join(head)}: {NOT_MEASURED}."
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
