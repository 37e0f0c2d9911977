"""What the guide says of retain terms is in the records."""

import json

import numpy as np
from test_studies import RESULTS, gap, mean_and_interval, retention


# method: its variants with labels, with "kl", and with "kl" on varied samples
SHOWN = {
    "OrthoGrad + NPO": ("OrthoGrad + NPO", "OrthoGrad + NPO, kl", "OrthoGrad + NPO, kl, varied"),
    "NPO": ("NPO", "NPO, kl", "NPO, kl, varied"),
    "SimNPO": (None, None, "SimNPO, kl, varied"),
    "OrthoGrad, ascent": (None, None, "OrthoGrad, ascent, kl, varied"),
    "mean projection": (None, None, "mean projection, kl, varied"),
    "GradDiff": ("GradDiff", None, "GradDiff, kl, varied"),
    "SCRUB, KL weight 0.001 and 1": ("SCRUB", "SCRUB, KL weight 1", "SCRUB, KL weight 1, varied"),
}


def test_retain_terms_in_the_guide_are_those_of_the_records():
    runs = json.loads((RESULTS / "study_retention.json").read_text())["runs"]

    def gaps(variant):
        pairs = [(runs[f"final random-{s} 0.05 {variant}"], runs[f"retrained random-{s}"]) for s in range(8)]
        return np.array([gap(*pair) for pair in pairs])

    guide = (RESULTS.parent.parent / "docs" / "choosing_settings.md").read_text()
    for method, variants in SHOWN.items():
        cells = ["not measured" if one is None else f"{gaps(one).mean():.3f}" for one in variants]
        difference = gaps(variants[2]) - gaps(retention.DEFAULT)
        cells.append(mean_and_interval(difference) if difference.any() else "")
        assert f"| {method} | {' | '.join(cells)} |".replace("  |", " |") in guide.replace("**", "")
    ours, other = (gaps(f"{method}, kl, varied, k = 256") for method in ("OrthoGrad + NPO", "NPO"))
    more = mean_and_interval(other - ours)
    said = f"OrthoGrad + NPO has {ours.mean():.3f}, and NPO {other.mean():.3f}: {more} more."
    assert said in guide.replace("**", "")


KL = {
    "GradDiff, labels": "GradDiff",
    "SCRUB, labels": "SCRUB",
    "NPO, labels": "NPO",
    "OrthoGrad + NPO, labels": "OrthoGrad + NPO",
    'NPO, "kl", varied': "NPO, kl, varied",
    'OrthoGrad + NPO, "kl", varied': retention.DEFAULT,
}


def test_sizes_and_the_class_in_the_guide_are_those_of_the_records():
    runs = json.loads((RESULTS / "study_retention.json").read_text())["runs"]
    guide = (RESULTS.parent.parent / "docs" / "choosing_settings.md").read_text().replace("**", "")

    def gaps(kind, share, variant):
        pairs = [(runs[f"final {kind}-{s} {share} {variant}"], runs[f"retrained {kind}-{s}"]) for s in range(8)]
        return np.array([gap(*pair) for pair in pairs])

    sizes = ("0.01", "0.05", "0.2", "proxy")
    for shown, variant in KL.items():
        cells = [f"{gaps('random', size, variant).mean():.3f}" for size in sizes]
        assert f"| {shown} | {' | '.join(cells)} |" in guide
    less = [
        mean_and_interval(gaps("random", z, "NPO, kl, varied") - gaps("random", z, retention.DEFAULT)) for z in sizes
    ]
    assert f'| NPO, "kl", varied: less that | {" | ".join(less)} |' in guide
    rows = {
        "OrthoGrad + NPO": ("OrthoGrad + NPO", retention.DEFAULT),
        'the same, `projection_target="update"`': ("OrthoGrad + NPO, update", "OrthoGrad + NPO, kl, varied, update"),
        "NPO": ("NPO", "NPO, kl, varied"),
        "SCRUB": ("SCRUB", None),
        "GradDiff": ("GradDiff", None),
    }
    for method, (labels, varied) in rows.items():
        own = gaps("class", "0.05", labels)
        held = "not measured" if varied is None else f"{gaps('class', '0.05', varied).mean():.3f}"
        difference = mean_and_interval(own - gaps("class", "0.05", retention.DEFAULT))
        assert f"| {method} | {own.mean():.3f} | {held} | {difference} |" in guide
    wide = [gaps("class", "0.05", f"{method}, kl, varied, k = 256").mean() for method in ("OrthoGrad + NPO", "NPO")]
    assert f"with 256 the gap is {wide[0]:.3f}, and NPO's {wide[1]:.3f}." in guide


def copies_in(runs):
    """Rows of the guide's table of retain images that are read more than once in a step, and what is said of steps."""

    def gaps(variant):
        pairs = [(runs[f"final random-{s} 0.01 {variant}"], runs[f"retrained random-{s}"]) for s in range(8)]
        return np.array([gap(*pair) for pair in pairs])

    ours = [
        gaps(f"OrthoGrad + NPO, kl, {how}") for how in ("varied", "varied, k = 256", "four varied copies, k = 256")
    ]
    npo = [gaps(f"NPO, kl, {how}") for how in ("varied", "four varied copies, k = 256")]
    less = [mean_and_interval(own - ours[0]) for own in ours[1:]]
    found = (RESULTS.parent.parent / "docs" / "results.md").read_text()
    copied = mean_and_interval(npo[1] - ours[2])
    assert f"bring OrthoGrad to {ours[2].mean():.3f}, and NPO to {npo[1].mean():.3f}: {copied} more." in found
    more = [mean_and_interval(other - own) for other, own in zip(npo, (ours[0], ours[2]), strict=True)]
    return [
        f"| OrthoGrad + NPO | {' | '.join(f'{own.mean():.3f}' for own in ours)} |",
        f"| less that of 64 rows | | {less[0]} | {less[1]} |",
        f"| NPO | {npo[0].mean():.3f} | not measured | {npo[1].mean():.3f} |",
        f"| NPO: less OrthoGrad + NPO | {more[0]} | | {more[1]} |",
    ]


def test_copies_and_steps_in_the_guide_are_those_of_the_records():
    runs = json.loads((RESULTS / "study_retention.json").read_text())["runs"]
    guide = (RESULTS.parent.parent / "docs" / "choosing_settings.md").read_text().replace("**", "")
    for row in copies_in(runs):
        assert row in guide

    def steps(kind, variant):
        return [runs[f"final {kind}-{seed} 0.05 {variant}"]["steps"] for seed in range(8)]

    whole = [
        sum(count == 48 for count in steps("random", of))
        for of in ("GradDiff", retention.DEFAULT, "OrthoGrad + NPO, kl, varied, k = 256", "NPO, kl, varied, k = 256")
    ]
    assert whole == [8, 5, 7, 0]
    assert (
        "used all 48 in each of eight seeds. OrthoGrad" in guide
        and "did in 5, with 256 samples a\nstep in 7, NPO with 256 in none." in guide
    )
    shown = (
        "GradDiff",
        "OrthoGrad + NPO",
        retention.DEFAULT,
        "NPO, kl, varied",
        "OrthoGrad + NPO, kl, varied, update",
    )
    taken = [count for variant in shown for count in steps("class", variant)]
    assert f"{min(taken)} to {max(taken)} steps" in guide
