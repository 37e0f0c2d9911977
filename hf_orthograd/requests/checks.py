"""Whether what was asked holds today: in the records, and in what the model says."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..publishing import load_records
from ..validation import stored_row
from .request import Request


@dataclass
class CheckedRequest:
    """One request against the model of today.

    Attributes:
        number, request_id: Of the request.
        problems (`list[str]`): What differs from the records; empty if nothing does.
        measured (`dict[str, dict[str, float]]`): Metrics on its forget set "before" and "after" its own run.
        now (`dict[str, float]`, *optional*): The same under the model of today, if it was measured.
    """

    number: int
    request_id: str
    problems: list[str]
    measured: dict[str, dict[str, float]]
    now: dict[str, float] | None

    @property
    def came_back(self) -> float | None:
        """Share of the loss that its run added which later runs took away: 0, nothing came back; 1, all did."""
        if self.now is None or not self.measured:
            return None
        before, after = (self.measured[when]["forget_loss"] for when in ("before", "after"))
        if after <= before:  # its run added nothing
            return None
        return (after - self.now["forget_loss"]) / (after - before)

    def __str__(self) -> str:
        parts = [f"request {self.number} ({self.request_id}): " + ("; ".join(self.problems) or "as recorded")]
        if self.now is not None and self.measured:
            losses = [self.measured["before"], self.measured["after"], self.now]
            before, after, now = (each["forget_loss"] for each in losses)
            share = "its run added nothing" if self.came_back is None else f"{self.came_back:.0%} came back"
            parts.append(f"loss on its forget set {before:.3f} before, {after:.3f} after, {now:.3f} now: {share}")
        return "; ".join(parts)


def check_record(request: Request, carrier: Request, model: Path) -> Iterator[str]:
    """What a model's records do not say of a request that was carried out, as far as its salt and rows are kept."""
    records = [record for record in load_records(model) if request.request_id in record.request_id.split(", ")]
    if not records:
        yield "no record of the model names it"
        return
    salt = carrier.salt()
    if salt is None:
        return
    if not records[-1].is_sealed_by(salt):
        yield "its record does not carry the seal of its salt"
    rows = request.rows("forget")
    if rows is None:
        return
    missing = sum(not records[-1].includes(stored_row(rows, row), salt) for row in range(len(rows)))
    if missing:
        yield f"{missing} of its {len(rows)} rows are in no commitment"
