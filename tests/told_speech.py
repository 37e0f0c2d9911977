"""The tables of the docs on speech, made from the records of the studies: `{page: tables}`, each a list of lines."""

import json

import numpy as np
from test_studies import RESULTS, mean_and_interval
from told_images import SEEDS, rows, runs_of


# isort: split

from speakers import REFUSING, WRONG, at_level


ERASURE, SPEAKERS = runs_of("speech") | runs_of("erasure"), runs_of("speakers")


def rate(name: str, of: str, digits: int = 1) -> str:
    return f"{100 * np.mean([ERASURE[name.format(seed)]['quality'][of][0] for seed in SEEDS]):.{digits}f} %"


def others_pay() -> list[str]:
    few = [
        rate(f"{method} speaker-{{}} 0.05", "test")
        for method in ("OrthoGrad + NPO", "NPO", "SCRUB", "GradDiff", "OrthoGrad, ascent")
    ]
    every = [
        rate(f"{method} speaker-{{}} 1", "test") for method in ("OrthoGrad + NPO, k = 32", "NPO, 32 retain samples")
    ]
    return [f"| 7 utterances | {' | '.join(few)} |", f"| all, k = 32 | {' | '.join(every)} | | | |"]


def unseen_of_the_speaker() -> list[str]:
    shown = ("original speaker-{}", "retrained speaker-{}", "OrthoGrad + NPO, k = 32 speaker-{} 1")
    return [f"| | {' | '.join(rate(name, 'forget_unseen', 0) for name in shown)} |"]


def four_at_a_time() -> list[str]:
    """Where the loss on the forgotten has reached 1 nat, between two evaluations."""
    cells = {}
    for label, variant, seed in (
        ("first", "kl", 0),
        ("second", "kl", 1),
        ("first, utterances at hand varied", "kl, varied", 0),
    ):
        runs = [SPEAKERS[f"{method}, {variant} speakers-{seed} 0.05"] for method in ("OrthoGrad + NPO", "NPO")]
        ends = [f"{100 * run['quality']['test'][0]:.0f} %" for run in runs]
        cells[label] = [*ends, *(f"{loss_at(run['path'], 1.0):.2f}" for run in runs)]
    return rows(cells)


ANOTHER = {name: seed for seed, name in enumerate(("first", "second", "third", "fourth", "fifth", "sixth", "seventh"))}


def another_answer(seed: int) -> list[dict]:
    return [
        SPEAKERS[f"{variant} speakers-{seed} 0.05"] for variant in (REFUSING, REFUSING.removeprefix("OrthoGrad, "))
    ]


def four_by_another_answer() -> list[str]:
    cells = {}
    for label, seed in ANOTHER.items():
        runs = another_answer(seed)
        ends = [f"{100 * run['quality'][of][0]:.0f} %" for of in ("forget", "test") for run in runs]
        passed = [f"{100 * at_level(run['path'], WRONG, 'wer', 'wer'):.0f} %" for run in runs]
        cells[label] = [*ends, *passed]
    return rows(cells)


def loss_at(path: list[dict], level: float) -> float:
    for before, after in zip(path, path[1:], strict=False):
        if before["forget_loss"] < level <= after["forget_loss"]:
            share = (level - before["forget_loss"]) / (after["forget_loss"] - before["forget_loss"])
            return before["test_loss"] + share * (after["test_loss"] - before["test_loss"])
    raise LookupError(f"The loss never came to {level}.")


def rises() -> list[str]:
    lines = []
    for run in json.loads((RESULTS / "retain_rises.json").read_text()):
        steps = [one for one in run["logs"] if "retain_rises" in one]
        rose = sum(one["retain_rises"] > 0 for one in steps)
        share = 100 * np.mean([one["retain_rises"] for one in steps])
        largest = np.mean([one["largest_retain_rise"] for one in steps])
        lines.append((run["alpha"], run["target"], rose, len(steps), share, largest))
    return [
        f'| {alpha:g} | "{target}" | {rose} of {count} | {share:.1f} % | {largest:.2g} nats |'
        for alpha, target, rose, count, share, largest in lines
    ]


def two_requests() -> str:
    less = [
        np.subtract(
            *(
                loss_at(SPEAKERS[f"{method}, kl speakers-{seed} 0.05"]["path"], 1.0)
                for method in ("NPO", "OrthoGrad + NPO")
            )
        )
        for seed in (0, 1)
    ]
    middle, half = map(float, mean_and_interval(less).split(" ± "))
    return f"Two requests show no difference ({middle:.2f} ± {half:.2f} nats)"


def in_points(differences: list[float]) -> str:
    middle, half = map(float, mean_and_interval(differences).split(" ± "))
    return f"{middle:.0f} ± {half:.0f} points less"


def seven_requests() -> str:
    """In the end: what others pay, and how much is forgotten."""
    pairs = [another_answer(seed) for seed in ANOTHER.values()]
    less = [100 * (plain["quality"]["test"][0] - ours["quality"]["test"][0]) for ours, plain in pairs]
    ours, plain = (f"{100 * np.mean([pair[i]['quality']['forget'][0] for pair in pairs]):.0f} %" for i in (0, 1))
    wrong = (
        f"Over all forgotten utterances about as many words are wrong, {ours} with the projection and {plain} without."
    )
    return f"In the end the others pay {in_points(less)}. {wrong}"


def seven_requests_cost() -> str:
    ends = [another_answer(seed)[0]["quality"]["test"][0] for seed in ANOTHER.values()]
    return f"with the projection their WER is {100 * np.mean(ends):.0f} % in the end."


def seven_requests_at_the_level() -> str:
    """And who pays what before a run."""
    passed = [
        [at_level(run["path"], WRONG, "wer", "wer") for run in another_answer(seed)] for seed in ANOTHER.values()
    ]
    before = [SPEAKERS[f"original speakers-{seed}"]["quality"]["test"][0] for seed in ANOTHER.values()]
    assert {f"{100 * one:.0f}" for one in before} == {"6", "7"}
    found = in_points([100 * (plain - ours) for ours, plain in passed])
    return f"At the same level of the watched utterances the others pay {found} with the projection"


SAID = {"docs/results.md": [two_requests, seven_requests, seven_requests_cost, seven_requests_at_the_level]}
TABLES = {"docs/results.md": [others_pay, unseen_of_the_speaker, four_at_a_time, four_by_another_answer, rises]}
