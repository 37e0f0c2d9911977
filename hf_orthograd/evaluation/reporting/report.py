"""[`UnlearningReport`]: what was measured, beside what a retrained model gives, and nothing that was not."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..membership import MembershipInference
from ..quality import Quality, Rate
from .tables import report_as_markdown


REPORT_NAME = "unlearning_report"


@dataclass
class Check:
    """One number against what it is compared with.

    Attributes:
        name (`str`): What was measured.
        rule (`str`): When it holds, in words.
        value (`float`, *optional*): The unlearned model's; None if it was not measured.
        compared_with (`float`, *optional*): The reference's, or the level asked for; None if there was none.
        tolerance (`float`): How far from it still holds.
        holds (`bool`, *optional*): None where value or comparison is missing: then nothing is known.
        before (`float`, *optional*): The original's; None if it was not measured.
    """

    name: str
    rule: str
    value: float | None
    compared_with: float | None
    tolerance: float
    holds: bool | None
    before: float | None = None


@dataclass
class RelearningPoint:
    """The forget set's quality after so many steps of an attack."""

    step: int
    loss: float
    value: float | None


@dataclass
class HardestHit:
    """The group of a set whose metric became worse by most: a retained speaker, say, or a class."""

    group: str
    before: float
    after: float


@dataclass
class UnlearningReport:
    """What `evaluate_unlearning` found.

    Attributes:
        goal (`str`): "retrained", to be like a model that never saw the forget set, or "erased", to fail on it.
        metric (`str`, *optional*): Name of the metric; without one only losses were measured.
        greater_is_better (`bool`): Whether more of it is better.
        models (`dict[str, dict[str, Quality]]`): For "unlearned", "original", "reference" and, as "unlearned, int8", the
            attacked ones, the quality on each set.
        hardest_hit (`dict[str, HardestHit]`): For "retain" and "test", measured in groups under the original model too,
            the group that lost most.
        membership (`dict[str, dict[str, MembershipInference]]`): For each model, forget samples against each set of
            samples that were never trained on.
        distances (`dict[str, dict[str, float]]`): For each model and set, the KS distance of its losses to the
            reference's.
        relearning (`dict[str, dict[str, list[RelearningPoint]]]`): For each such attack and model, the curve.
        recovery_steps (`dict[str, dict[str, int | None]]`): For each such attack and model, the first watched step at
            which half of the forget quality between reference and original was back; None if it never was.
        summary (`dict[str, float | None]`): "tug_of_war", "average_gap", "unlearning_impact_score".
        checks (`list[Check]`): Each number against the reference.
        cost (`dict[str, dict[str, float | None]]`): For "unlearning", and whatever was passed beside it, "seconds",
            "steps", "peak_memory_gib". Seconds of a run that went on from a checkpoint are those up to it, too.
        settings (`dict`): Of the run: method, samples in a step, optimizer, and in words how it ended.
        history (`list[dict]`): The trainer's log of the run.
        losses (`dict[str, dict[str, list[float]]]`): Per-sample losses, for each model and set.
        audience (`str`): "owner", whose report is complete, or "everyone", as `public()` makes it.
        made (`str`): When, and by which version of this library.
    """

    goal: str
    metric: str | None
    greater_is_better: bool
    models: dict[str, dict[str, Quality]]
    hardest_hit: dict[str, HardestHit] = field(default_factory=dict)
    membership: dict[str, dict[str, MembershipInference]] = field(default_factory=dict)
    distances: dict[str, dict[str, float]] = field(default_factory=dict)
    relearning: dict[str, dict[str, list[RelearningPoint]]] = field(default_factory=dict)
    recovery_steps: dict[str, dict[str, int | None]] = field(default_factory=dict)
    summary: dict[str, float | None] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    cost: dict[str, dict[str, float | None]] = field(default_factory=dict)
    settings: dict[str, str | float | int | None] = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    losses: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    audience: str = "owner"
    made: str = ""

    def public(self) -> "UnlearningReport":
        """The edition for others: without per-sample losses, the trainer's log, and names of one's own.

        Names of sets, of attacks and of costs may be chosen freely, and so may tell whose data it was. That of a metric stays.
        """
        sets = _numbered((name for one in self.models.values() for name in one), PUBLIC_SETS, "set")
        attacks = _numbered(self._attacks(), PUBLIC_ATTACKS, "attack")
        costs = _numbered(self.cost, PUBLIC_COSTS, "cost")
        counts = _numbered((name for one in self.cost.values() for name in one), PUBLIC_COUNTS, "count")
        models = {f"{model}, {name}": f"{model}, {shown}" for name, shown in attacks.items() for model in WHOLE_MODELS}

        def renamed(values: dict, *names: dict[str, str]) -> dict:
            """With other keys, at each level."""
            if not names:
                return values
            return {names[0].get(name, name): renamed(value, *names[1:]) for name, value in values.items()}

        return replace(
            self,
            models=renamed(
                _nested(self.models, lambda one: replace(one, groups=None, worst_group=None)), models, sets
            ),
            hardest_hit={name: replace(one, group="(not named)") for name, one in self.hardest_hit.items()},
            membership=renamed(self.membership, models, sets),
            distances=renamed(self.distances, models, sets),
            relearning=renamed(self.relearning, attacks),
            recovery_steps=renamed(self.recovery_steps, attacks),
            checks=[replace(check, name=_renamed_end(check.name, attacks)) for check in self.checks],
            cost=renamed(self.cost, costs, counts),
            history=[],
            losses={},
            audience="everyone",
        )

    def _attacks(self) -> list[str]:
        """Names of those that were made."""
        made = [name.split(", ", 1)[1] for name in self.models if name not in WHOLE_MODELS]
        return list(dict.fromkeys([*made, *self.relearning]))

    def to_json(self) -> str:
        return json.dumps({"audience": self.audience, "note": AUDIENCES[self.audience], **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "UnlearningReport":
        """The report that `to_json()` wrote."""
        values = json.loads(text)
        values.pop("note", None)
        values["models"] = _nested(values["models"], _quality)
        values["membership"] = _nested(values["membership"], lambda one: MembershipInference(**one))
        values["relearning"] = _nested(
            values["relearning"], lambda curve: [RelearningPoint(**point) for point in curve]
        )
        values["hardest_hit"] = {name: HardestHit(**one) for name, one in values["hardest_hit"].items()}
        values["checks"] = [Check(**check) for check in values["checks"]]
        return cls(**values)

    def save(self, folder: str | Path, page: bool = True) -> None:
        """Writes `unlearning_report.json`, `.md`, `.html` and the figures.

        Args:
            page (`bool`, defaults to `True`): Whether to write the page.
        """
        from .figures import plot_report

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{REPORT_NAME}.json").write_text(self.to_json() + "\n")
        (folder / f"{REPORT_NAME}.md").write_text(self.to_markdown() + "\n")
        if page:
            (folder / f"{REPORT_NAME}.html").write_text(self.to_html(), encoding="utf-8")
        plot_report(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> "UnlearningReport":
        """Reads what `save()` wrote."""
        return cls.from_json((Path(folder) / f"{REPORT_NAME}.json").read_text())

    def to_markdown(self) -> str:
        """Tables of all that was measured; "not measured" where something was not."""
        return report_as_markdown(self, AUDIENCES[self.audience], GOALS[self.goal])

    def to_html(self) -> str:
        """The same with figures, as one page that needs no network; readable on a phone, in print, in light and dark."""
        from .page import report_as_html

        return report_as_html(self, AUDIENCES[self.audience], GOALS[self.goal])


WHOLE_MODELS = ("unlearned", "original", "reference")  # all others are one of them after an attack

# what sets, attacks and costs may be called before everyone, as patterns; other names are the owner's
PUBLIC_SETS = ("forget", "forget_unseen", "forget_reworded", "retain", "test", "validation", "reference")
PUBLIC_ATTACKS = (r"int\d+", "adapter detached", "relearning")
PUBLIC_COSTS = ("unlearning", "retraining")
PUBLIC_COUNTS = ("seconds", "steps", "peak_memory_gib")

AUDIENCES = {
    "owner": "For the owner alone: it names groups and holds per-sample losses. `public()` is the edition for others.",
    "everyone": "The edition for others: no per-sample losses, no names of groups, no log.",
}

GOALS = {
    "retrained": "to behave as a model that was retrained without the forget set.",
    "erased": "to fail on the forget set, which a retrained model need not do.",
}


def _nested(values: dict, make) -> dict:
    return {outer: {inner: make(value) for inner, value in one.items()} for outer, one in values.items()}


def _quality(values: dict) -> Quality:
    further = {name: Rate(one["value"], _pair(one["interval"])) for name, one in values["further"].items()}
    return Quality(**{**values, "interval": _pair(values["interval"]), "further": further})


def _numbered(names: Iterable[str], public: Sequence[str], kind: str) -> dict[str, str]:
    """For each name that is not public the one that stands for it."""
    own = dict.fromkeys(name for name in names if not any(re.fullmatch(pattern, name) for pattern in public))
    return {name: f"{kind} {number}" for number, name in enumerate(own, start=1)}


def _renamed_end(text: str, shown: dict[str, str]) -> str:
    """A check's name ends in that of its attack."""
    for name in sorted(shown, key=len, reverse=True):
        if text.endswith((f" after {name}", f" under {name}")):
            return text.removesuffix(name) + shown[name]
    return text


def _pair(interval: list[float] | None) -> tuple[float, float] | None:
    return None if interval is None else tuple(interval)
