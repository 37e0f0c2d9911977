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
        'projection="none"': "none",
        'projection="orthogonal"': "orthogonal",
    }
    found = DEMOS["speech"]["rows"]
    names = {label: next(name for name in found if label_of in name) for label, label_of in shown.items()}
    return rows(
        {
            label: [f"{found[name][own]['wer']:.1f} / {found[name][own]['cer']:.1f}" for own in SEEN]
            for label, name in names.items()
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


TABLES = {
    "README.md": [speech],
    "docs/modalities.md": [people, captions, videos],
    "docs/results.md": [digits],
}
