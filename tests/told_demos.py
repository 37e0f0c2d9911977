"""The tables of README and docs on the examples' own data, made from one run of each: `{page: tables}`, each a list of lines."""

import json

from test_studies import RESULTS
from told_images import EMPTY, rows


DEMOS = json.loads((RESULTS / "demos.json").read_text())["runs"]
SEEN = ("forget", "forget_unseen", "retain", "test")
REWORDED = ("forget", "forget_reworded", "retain", "test")


def speech() -> list[str]:
    shown = {
        "before": "before",
        "retrained without her": "retrained",
        'projection="none"': 'projection="none"',
        'projection="orthogonal"': 'projection="orthogonal"',
    }
    found = DEMOS["speech"]["rows"]
    return rows(
        {
            label: [f"{found[name][own]['wer']:.1f} / {found[name][own]['cer']:.1f}" for own in SEEN]
            for label, name in shown.items()
        }
    )


def accuracies(demo: str, sets: tuple[str, ...], retrained: str) -> dict[str, list[str]]:
    shown = {"before": "original", "unlearned": "unlearned", retrained: "reference"}
    models = DEMOS[demo]["models"]
    return {label: [f"{models[who][name]:.3f}" for name in sets] for label, who in shown.items()}


def back(demo: str, who: str) -> int:
    """Points in a hundred that the attacker has after the last step of a curve."""
    (curves,) = DEMOS[demo]["relearning"].values()
    return round(100 * curves[who][-1][1])


def digits() -> list[str]:
    found = accuracies("digits", SEEN, "retrained without the threes")
    run = DEMOS["digits"]["unlearning"]
    found = {f"{label}, {run['steps']} steps" if label == "unlearned" else label: own for label, own in found.items()}
    ends = [EMPTY, *(f"{back('digits', who)} %" for who in ("unlearned", "reference"))]
    cells = {label: [*own, end] for (label, own), end in zip(found.items(), ends, strict=True)}
    return [line.replace("|  |", "| |") for line in rows(cells)]


def videos() -> list[str]:
    return rows(accuracies("videos", SEEN, "retrained without them"))


def captions() -> list[str]:
    return rows(accuracies("captions", SEEN, "retrained without the threes"))


def people() -> list[str]:
    return rows(accuracies("people", REWORDED, "retrained without the two"))


def what_comes_back() -> str:
    """Of the texts; the captions' and the videos' are told where they are."""
    unlearned, retrained = (back("people", who) for who in ("unlearned", "reference"))
    return f"brings {unlearned} % of the rest back; in the retrained model {retrained} %, too."


def captions_that_come_back() -> str:
    assert back("captions", "reference") == 0
    return f"brings back {back('captions', 'unlearned')} % of the captions of the rest; in the retrained model none."


def videos_that_come_back() -> str:
    """After 5 steps of the attacker."""
    (curves,) = DEMOS["videos"]["relearning"].values()
    after = {who: dict(map(tuple, curve))[5] for who, curve in curves.items()}
    assert after["reference"] == 0.0
    return f"learned for 5 steps, bring back {100 * after['unlearned']:.0f} %; in the retrained model none."


SAID = {"docs/modalities.md": [what_comes_back, captions_that_come_back, videos_that_come_back]}
TABLES = {
    "README.md": [speech],
    "docs/modalities.md": [people, captions, videos],
    "docs/results.md": [digits],
}
