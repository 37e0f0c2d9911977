"""Whether what was asked holds today: in the records, and in what the model says."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset
from transformers.utils import CONFIG_NAME, cached_file, logging

from ..publishing import UnlearningRecord, is_weights, load_records, published_files
from ..validation import stored_row
from .duplicates import FoundRow, check_dataset, same_rows
from .request import Request


if TYPE_CHECKING:
    from .history import RequestHistory


logger = logging.get_logger(__name__)


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


def lost_requests(history: "RequestHistory") -> list[tuple[int, str]]:
    """Place and name of each request that the records of today's model name, and no folder of the history."""
    known = {request.request_id for request in history.requests}
    before = len(load_records(history.original))  # the original may have been unlearned outside of this history
    names = [name for record in load_records(history.model)[before:] for name in record.request_id.split(", ")]
    return [(place, name) for place, name in enumerate(names, start=1) if name not in known]


def find_rows(history: "RequestHistory", dataset: Dataset, column: Iterable | None) -> list[FoundRow]:
    """What [`RequestHistory.check_dataset`] returns; a warning for each request, or kind of row, that is not looked for."""
    found: dict[tuple[int, str], FoundRow] = {}
    records = load_records(history.model)
    for number, name in lost_requests(history):
        logger.warning(f"Request {number} ({name}) is not looked for: its folder is gone from the history.")
    labelled = "labels" in dataset.column_names
    if not labelled:
        logger.warning(
            "The new rows have no `labels`: exact rows of requests that had some are found only where their rows are kept."
        )
    for request in history.requests:
        salt, sketches, rows = request.salt(), request.sketches(), request.rows("forget")
        known = []
        if history.carrier(request) == request and salt is not None and (labelled or rows is None):
            known = check_dataset(dataset, [one for one in records if one.is_sealed_by(salt)], salt)
        elif rows is not None:
            known = same_rows(dataset, rows, request.request_id)
        near = salt is not None and sketches is not None
        if column is not None and near:
            known += [FoundRow(row, request.request_id, score) for row, score in sketches.find(column, salt)]
        elif salt is None and rows is None:
            logger.warning(f"Request {request.number} is not looked for: its rows and its salt were deleted.")
        elif column is not None:
            logger.warning(f"Near duplicates of request {request.number} are not looked for: it has no sketches.")
        for one in known:
            before = found.setdefault((one.row, one.request_id), one)
            found[one.row, one.request_id] = max(before, one, key=lambda each: each.similarity)
    return sorted(found.values(), key=lambda one: (-one.similarity, one.row))


def _repeated(request: Request, records: list[UnlearningRecord], forget: Dataset) -> list[FoundRow]:
    """Rows that the request names, too, where its rows, or its salt and a record, can tell."""
    rows, salt = request.rows("forget"), request.salt()
    if rows is not None:
        same_columns = set(rows.column_names) == set(forget.column_names)
        return same_rows(forget, rows, request.request_id) if same_columns else []
    known = [
        record
        for record in records
        if salt is not None
        and record.is_sealed_by(salt)
        and set(record.committed_columns or ()) <= set(forget.column_names)
    ]
    return check_dataset(forget, known, salt) if known else []


def warn_of_earlier(history: "RequestHistory", forget: Dataset) -> None:
    """Warns where rows to forget are those of an earlier request, or have other columns than the last one's."""
    records, requests = load_records(history.model), history.requests
    for request in requests:
        repeated = {one.row for one in _repeated(request, records, forget)}
        if repeated:
            logger.warning(
                f"{len(repeated)} of the {len(forget)} rows to forget are also in request {request.number} "
                f"({request.request_id}): they are asked for twice."
            )
    last = requests[-1].rows("forget") if requests else None
    if last is not None and set(last.column_names) != set(forget.column_names):
        logger.warning(
            f"The rows to forget have the columns {forget.column_names}, those of request {requests[-1].number} have "
            f"{last.column_names}: `make_trainer` has to take both."
        )


def original_files(model: str | Path) -> list[str]:
    """What to copy of the model that a history begins with: files of a folder; of a model on the Hub, nothing.

    Raises:
        ValueError: The folder holds no weights, or the Hub has no such model.
    """
    if Path(model).is_dir():
        names = published_files(Path(model))
        if not any(map(is_weights, names)):
            raise ValueError(f"`model` {str(model)!r} holds no weights in safetensors: save it by `save_pretrained`.")
        return names
    try:
        cached_file(str(model), CONFIG_NAME)
    except OSError as error:
        raise ValueError(
            f"`model` is {str(model)!r}, but there is no such folder, nor such a model: {error}"
        ) from error
    return []
