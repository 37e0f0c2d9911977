"""What takes back or deletes: each checks all before it changes anything. The history's lock is held, in the first process."""

from typing import TYPE_CHECKING

from ..publishing import SALT_NAME, verify
from .keeping import ORIGINAL
from .request import MEASURED_NAME, PLAN_NAME, SKETCHES_NAME, Request, remove


if TYPE_CHECKING:
    from .history import RequestHistory


def roll_back(history: "RequestHistory", number: int) -> list[Request]:
    """As [`RequestHistory.roll_back`]."""
    requests = history.requests
    known = {request.number for request in requests if request.model.exists()}
    if number != 0 and number not in known:
        raise ValueError(f"`number` is {number}, but models are kept after {sorted(known)}; 0 is the original.")
    kept_here = history.original == str(history.folder / ORIGINAL)
    if number == 0 and kept_here and not (history.folder / ORIGINAL).exists():
        raise ValueError(f"`number` is 0, but the original was deleted from {history.original!r}: put it there again.")
    if number != 0 and (problems := verify(history.request(number).model)):
        raise ValueError(f"`number` is {number}, but its model is not as recorded: {'; '.join(problems)}.")
    later = [request for request in requests if request.number > number and request.plan is not None]
    undone = [history.request(one) for request in later for one in request.plan["numbers"]]
    ran = {one for run in later if _has_run(history, run) for one in run.plan["numbers"]}
    lost = [request.number for request in undone if request.rows("forget") is None or request.salt() is None]
    if lost:
        raise ValueError(
            f"`number` is {number}, but rows or salts of requests {lost} were deleted: they could not be carried out again."
        )
    for request in reversed(later):  # the newest first: what is left is a history at any moment
        remove(request.model)
        for one in request.plan["numbers"]:
            _forget_run(history.request(one))
        (request.folder / PLAN_NAME).unlink(missing_ok=True)
    history.tidy()
    return [request for request in undone if request.number in ran and history.carrier(request) is None]


def _has_run(history: "RequestHistory", run: Request) -> bool:
    """Whether more than a plan came of it; what it measured is the last to go, so that a roll back may be killed and go on."""
    return run.has_begun or history.carrier(run) is not None or bool(run.measured)


def _forget_run(request: Request) -> None:
    """Deletes reports and metrics of a run whose model is gone; what came with the request stays."""
    for path in sorted(request.private.iterdir(), key=lambda path: path.name == MEASURED_NAME):
        if path.name not in ("forget", "retain", SALT_NAME, SKETCHES_NAME):
            remove(path)


def withdraw(history: "RequestHistory", number: int) -> None:
    """As [`RequestHistory.withdraw`]."""
    request = history.request(number)
    if history.carrier(request) is not None:
        raise ValueError(f"`number` is {number}, but it was carried out: `roll_back` to the one before it first.")
    plans = [other.plan for other in history.requests if other.has_begun]
    if any(number in plan["numbers"] for plan in plans):
        raise ValueError(f"`number` is {number}, but its run has begun: `roll_back` to the one before it first.")
    for other in history.requests:
        if other.plan is not None and number in other.plan["numbers"]:  # a plan that came to nothing
            (other.folder / PLAN_NAME).unlink()
    remove(request.folder)


def delete_data(history: "RequestHistory", number: int, salt: bool) -> None:
    """As [`RequestHistory.delete_data`]."""
    request = history.request(number)
    carrier = history.carrier(request)
    if carrier is None:
        raise ValueError(f"`number` is {number}, which is no request that was carried out: its data are needed.")
    if any(other.has_begun and other.plan["hold_earlier"] for other in history.pending()):
        raise ValueError(f"`number` is {number}, whose rows a run that has begun holds: end it by `run` first.")
    if salt and carrier != request:
        raise ValueError(
            f"`number` is {number}, whose rows are committed to under the salt of request {carrier.number}, that it was merged "
            "into: delete that one's."
        )
    remove(request.private / "forget")
    remove(request.private / "retain")
    for other in history.requests if salt else ():
        if history.carrier(other) == request:
            remove(other.private / SALT_NAME)
            remove(other.private / SKETCHES_NAME)
    history.tidy()
