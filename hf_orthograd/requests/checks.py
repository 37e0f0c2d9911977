"""Whether what was asked holds today: in the records, and in what the model says."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset
from transformers.utils import logging

from ..publishing import UnlearningRecord, load_records, verify
from ..validation import LABEL_NAMES, label_column, stored_row
from .duplicates import FoundRow, RowDigests, committed_rows, kind_of, same_rows
from .request import Request


if TYPE_CHECKING:
    from .history import RequestHistory


logger = logging.get_logger(__name__)

RETURNED = 0.1  # the share of the loss that a run added from which on its loss is told


@dataclass
class CheckedRequest:
    """One request against the model of today.

    Attributes:
        number, request_id: Of the request.
        problems (`list[str]`): What differs from the records; empty if nothing does.
        measured (`dict[str, dict[str, float]]`): Metrics on its forget set "before" and "after" its own run.
        now (`dict[str, float]`, *optional*): The same under the model of today, if it was measured.
        unchecked (`list[str]`): What could not be checked, as the model, the salt or the rows were deleted.
    """

    number: int
    request_id: str
    problems: list[str]
    measured: dict[str, dict[str, float]]
    now: dict[str, float] | None
    unchecked: list[str] = field(default_factory=list)

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
        parts += [f"not checked, as it was deleted: {', '.join(self.unchecked)}"] if self.unchecked else []
        if self.now is not None and self.measured:
            losses = [self.measured["before"], self.measured["after"], self.now]
            before, after, now = (each["forget_loss"] for each in losses)
            share = "its run added nothing"
            if self.came_back is not None:
                share = "none came back" if self.came_back <= 0 else f"{self.came_back:.0%} came back"
            parts.append(f"loss on its forget set {before:.3f} before, {after:.3f} after, {now:.3f} now: {share}")
        return "; ".join(parts)


def check_record(request: Request, carrier: Request, model: Path, *, measures: bool) -> tuple[list[str], list[str]]:
    """What a model's records do not say of a request that was carried out, and what cannot be checked as it was deleted."""
    records = [record for record in load_records(model) if request.request_id in record.request_id.split(", ")]
    if not records:
        return ["no record of the model names it"], []
    problems, unchecked = [], []
    if carrier.model.exists() and carrier.model != model and (differing := verify(carrier.model)):
        problems.append(f"the model that its run left is not as recorded: {'; '.join(differing)}")
    salt, rows = carrier.salt(), request.rows("forget")
    if not carrier.model.exists():
        unchecked.append("the model that its run left")
    if salt is None:
        unchecked.append("its seal")
    elif not records[-1].is_sealed_by(salt):
        problems.append("its record does not carry the seal of its salt")
    if salt is None or rows is None:
        unchecked.append("its commitments")
    else:
        missing = sum(not records[-1].includes(stored_row(rows, row), salt) for row in range(len(rows)))
        problems += [f"{missing} of its {len(rows)} rows are in no commitment"] if missing else []
    if measures and rows is None:
        unchecked.append("its loss")
    return problems, unchecked


def lost_requests(history: "RequestHistory") -> list[tuple[int, str]]:
    """Place and name of each request that the records of today's model name, and no folder of the history."""
    if history.model == history.original:
        return []
    known = {request.request_id for request in history.requests}
    records = load_records(history.model)[history.records_before :]
    names = [name for record in records for name in record.request_id.split(", ")]
    return [(place, name) for place, name in enumerate(names, start=1) if name not in known]


def find_rows(history: "RequestHistory", dataset: Dataset, column: Iterable | None) -> list[FoundRow]:
    """What [`RequestHistory.check_dataset`] returns; a warning for each request, or kind of row, that is not looked for."""
    found: dict[tuple[int, str], FoundRow] = {}
    records, digests = load_records(history.model), RowDigests()
    check_values("column", column)
    column = None if column is None else list(column)
    if column is not None and len(column) != len(dataset):
        raise ValueError(
            f"`column` has {len(column)} values, but `dataset` has {len(dataset)} rows: pass a column of it."
        )
    kind = kind_of(column[0], 0) if column else None
    for number, name in lost_requests(history):
        logger.warning(f"Request {number} ({name}) is not looked for: its folder is gone from the history.")
    labelled = label_column(dataset.column_names) is not None
    if not labelled:
        logger.warning(
            "The new rows have no `labels`: exact rows of requests that had some are found only where their rows are kept."
        )
    for request in history.requests:
        rows, carrier = request.rows("forget"), history.carrier(request)
        sealed = _sealed(carrier, records)
        merged = carrier is not None and len(carrier.plan["numbers"]) > 1
        near, why = ([], None) if kind is None else _near_rows(request, column, kind)
        known = []
        by_record = carrier == request and sealed and (labelled or rows is None)
        if by_record:  # also those that were merged into its run
            known = committed_rows(dataset, sealed, request.salt(), digests)
        if rows is not None and (merged or not by_record):
            known += same_rows(dataset, rows, request.request_id, digests)
        elif rows is None and not sealed and (kind is None or why is not None):
            logger.warning(
                f"Request {request.number} is not looked for: its rows were deleted, and no salt opens its record."
            )
        if why is not None and (sealed or rows is not None):
            logger.warning(f"Near duplicates of request {request.number} are not looked for: {why}.")
        for one in [*known, *near]:
            before = found.setdefault((one.row, one.request_id), one)
            found[one.row, one.request_id] = max(before, one, key=lambda each: (each.exact, each.similarity))
    exact = {(one.row, one.request_id) for one in found.values() if one.exact}
    # the record of a merged run says that a row is in one of its requests, their rows say in which
    told = [one for one in found.values() if not exact.intersection((one.row, name) for name in _merged_in(one))]
    return sorted(told, key=lambda one: (not one.exact, -one.similarity, one.row))


def _near_rows(request: Request, column: list, kind: str) -> tuple[list[FoundRow], str | None]:
    """Near duplicates of a request's rows, and, where they cannot be looked for, why."""
    sketches, salt = request.sketches(), request.salt()
    if sketches is None:
        return [], "it has no sketches"
    if salt is None:
        return [], "the salt of its sketches was deleted"
    if sketches.kind != kind:
        return [], f"its sketches are of {sketches.kind}, and `column` is {kind}: pass the column that was sketched"
    return [FoundRow(row, request.request_id, score, False) for row, score in sketches.find(column, salt)], None


def _merged_in(found: FoundRow) -> list[str]:
    """The requests that its name joins; none if it is that of one request."""
    names = found.request_id.split(", ")
    return names if len(names) > 1 else []


def _sealed(carrier: Request | None, records: list[UnlearningRecord]) -> list[UnlearningRecord]:
    """The records that commit to the rows of a run, where its salt is kept."""
    salt = None if carrier is None else carrier.salt()
    return [] if salt is None else [record for record in records if record.is_sealed_by(salt)]


def check_values(name: str, column: Iterable | None) -> None:
    """Checks that a column was not given by its name.

    Raises:
        ValueError: It was.
    """
    if isinstance(column, str):
        raise ValueError(f"`{name}` is {column!r}, but takes the values of a column: pass `dataset[{column!r}]`.")


def rows_of_earlier(history: "RequestHistory", dataset: Dataset) -> Iterator[tuple[Request, str, int]]:
    """Each request of whose rows some are in the data set, as far as its files tell, the names in its record, and how many rows they are."""
    records = load_records(history.model)
    columns, digests = set(dataset.column_names), RowDigests()
    for request in history.requests:
        rows, carrier = request.rows("forget"), history.carrier(request)
        sealed = _sealed(carrier, records)
        repeated = []
        if carrier == request and sealed and all(columns >= set(record.committed_columns or ()) for record in sealed):
            repeated = committed_rows(dataset, sealed, request.salt(), digests)
        elif rows is not None and columns >= set(rows.column_names) - LABEL_NAMES:
            repeated = same_rows(dataset, rows, request.request_id, digests)
        if repeated:
            yield request, repeated[0].request_id, len({one.row for one in repeated})


def warn_of_earlier(history: "RequestHistory", forget: Dataset) -> None:
    """Warns of rows to forget that an earlier request names, and of other columns than the last one's."""
    for _, name, count in rows_of_earlier(history, forget):
        logger.warning(
            f"{count} of the {len(forget)} rows to forget are also in request {name}: they are asked for twice. Leave "
            "them out, which `check_dataset` finds, or `withdraw` the one of the requests that is pending."
        )
    requests = history.requests
    last = requests[-1].rows("forget") if requests else None
    if last is not None and set(last.column_names) != set(forget.column_names):
        logger.warning(
            f"The rows to forget have the columns {forget.column_names}, those of request {requests[-1].number} have "
            f"{last.column_names}: `make_trainer` has to take both."
        )


def warn_of_taught(history: "RequestHistory", retain: object, done: Sequence[Request]) -> None:
    """Warns of rows to retain that a request asked to forget whose run is over: they would be taught again."""
    if not isinstance(retain, Dataset):
        return
    for request, name, count in rows_of_earlier(history, retain):
        if request.number in {one.number for one in done}:
            logger.warning(
                f"{count} of the {len(retain)} rows to retain were forgotten by request {name}: the run may teach "
                "them again. Leave them out; `check_dataset` finds them."
            )


def warn_of_return(checked: CheckedRequest) -> None:
    """Warns of a request whose rows have lost more than a tenth of what its run added to their loss, after a later run."""
    if checked.came_back is not None and checked.came_back > RETURNED:
        before, after = (checked.measured[when]["forget_loss"] for when in ("before", "after"))
        logger.warning(
            f"The run brought back what request {checked.number} ({checked.request_id}) asked to forget: the loss on its rows was {before:.3f} "
            f"before its own run, {after:.3f} after it, and is {checked.now['forget_loss']:.3f} now. `roll_back` undoes the run, and "
            "`hold_earlier` holds those rows in it."
        )
