"""An [`UnlearningReport`] as one HTML page: words and colours for what holds, figures that follow light and dark."""

import io
import re
from collections import Counter
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .figures import BLUE, GREEN, ORANGE, PLAIN, PURPLE, RED, SKY, draw_report
from .tables import (
    NOT_MEASURED,
    distances_table,
    membership_table,
    quality_lines,
    quality_note,
    relearning_table,
    set_sizes,
    settings_table,
    show,
    summary_table,
    worst_groups,
)


if TYPE_CHECKING:
    from .report import UnlearningReport


# name on the page, on white, on black: the figures' palette, lightened for a dark page, and the words of the checks
COLOURS = (
    ("blue", BLUE, "#4aa8e0"),
    ("orange", ORANGE, "#f0b429"),
    ("green", GREEN, "#2cc79a"),
    ("red", RED, "#f08a4b"),
    ("purple", PURPLE, "#dd9dc3"),
    ("sky", SKY, "#8fd0f5"),
    ("yes", "#00674c", "#2cc79a"),
    ("no", "#b34700", "#f08a4b"),
)
WORDS = {True: ("yes", "✓", "holds"), False: ("no", "✗", "does not hold"), None: ("unknown", "?", NOT_MEASURED)}
PLURALS = {True: "hold", False: "do not hold", None: NOT_MEASURED}
CAPTIONS = {
    "tradeoff": (
        "Forgetting and its price",
        "Loss of the forgotten and of the retained samples over the run. A line is a mean over neighbouring steps, the pale one "
        "behind it each step. Levels: the model before, and the retrained one.",
    ),
    "losses": (
        "Losses of samples",
        "Share of samples by loss. In the unlearned model they should lie as they do in the retrained one.",
    ),
    "groups": ("Who was hit", "Each group of retained samples, unseen, before and after."),
    "relearning": (
        "Learned again",
        "What comes back while an attacker trains on a part of the forget set, or on its kind.",
    ),
    "cost": ("Cost", "Of unlearning, and of what was measured beside it."),
}
LIMITS = (
    "A check says that one number lies near another. It does not prove that nothing of the data is left in the model.",
    "What was not measured is not known. It counts neither for nor against the model.",
    "An interval is over samples of one model. Another seed would give another model.",
    "Membership inference by a threshold on the loss is a weak attack. An attacker with shadow models finds more.",
)


def report_as_html(report: "UnlearningReport", audience: str, goal: str) -> str:
    """The page of a report.

    Args:
        report ([`UnlearningReport`]): What was measured.
        audience, goal (`str`): Sentences that say for whom it is, and what was asked of the model.
    """
    environment = Environment(loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined)
    found = Counter(WORDS[check.holds] for check in report.checks)
    tables = (
        (
            "Privacy",
            "How well a threshold on the loss tells the forget set from samples never trained on; 0.5 is chance. Far below "
            "it, the forgotten stand out by losses that are too high.",
        )
        + membership_table(report),
        ("Distance to the reference", "Between the losses of both models on a set; 0 is the same.")
        + distances_table(report),
        ("Relearning", "What is back after so many steps of an attack.") + relearning_table(report),
        ("Summary and cost", "Each number here hides something: read it beside what it is made of.")
        + summary_table(report),
        *([("Run", "How the model was made.") + settings_table(report)] if report.settings else []),
    )
    return environment.get_template("report.html").render(
        report=report,
        audience=audience.replace("`public()`", "The report's public()"),
        goal=goal,
        colours=COLOURS,
        counts=[(words, found[WORDS[holds]]) for holds, words in PLURALS.items()],
        checks=[_show_check(check) for check in report.checks],
        quality_note=f"In each cell: {quality_note(report)}.",
        sets=set_sizes(report),
        quality_lines=quality_lines,
        groups=[*worst_groups(report), *_hit_groups(report)],
        figures=[(*CAPTIONS[name], _inline(figure, name)) for name, figure in draw_report(report).items()],
        tables=tables,
        not_measured=NOT_MEASURED.capitalize(),
        limits=LIMITS,
    )


def _hit_groups(report) -> list[str]:
    return [
        f"The group of {name} that became worse by most: {hit.group}, from {hit.before:.3f} to {hit.after:.3f}."
        for name, hit in report.hardest_hit.items()
        if (hit.after < hit.before) == report.greater_is_better and hit.after != hit.before
    ]


def _show_check(check) -> dict[str, str]:
    kind, sign, word = WORDS[check.holds]
    numbers = {name: show(getattr(check, name)) for name in ("value", "compared_with")}
    numbers["before"] = "" if check.before is None else f"Before: {show(check.before)}. "
    return {"kind": kind, "sign": sign, "word": word, "name": check.name, "rule": check.rule} | numbers


def _inline(figure, name: str) -> Markup:
    """An SVG for within the page: its letters are text, its ink and its palette are the page's."""
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context(PLAIN | {"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = drawn.getvalue()
    text = text[text.index("<svg") :]
    text = text.replace("#000000", "currentColor").replace("#cccccc", "currentColor")
    for colour, light, _ in COLOURS[: len(CAPTIONS) + 1]:
        text = text.replace(light, f"var(--{colour})")
    # matplotlib numbers groups anew in each figure, and a page may hold an id once: those it refers to are hashes
    text = re.sub(r' id="(?![a-z][0-9a-f]{10}")[^"]*"', "", text)
    # without a fill a letter is black
    return Markup(text.replace("<svg ", '<svg style="color: var(--ink); fill: currentColor" ', 1))
