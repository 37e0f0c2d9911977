"""The commands around a history of requests; each is one call of [`RequestHistory`]."""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..requests import Request, RequestHistory


_DESCRIPTION = """A folder holds a model's history: the original, the requests in order, their records and models, and what the owner has to
keep. `run` needs a function of yours that makes the trainer, in a file:

    def make_trainer(model, forget, retain, output_dir):
        args = OrthoGradConfig(output_dir, save_strategy="steps", save_steps=10)
        return OrthoGradTrainer(AutoModel....from_pretrained(model), args, train_dataset=retain, forget_dataset=forget)

Rows are a folder of `save_to_disk`, or a parquet or JSON file, prepared as the trainer takes them."""


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds "requests" with its own subcommands to a parser's subparsers."""
    form = argparse.RawDescriptionHelpFormatter
    own = commands.add_parser(
        "requests", help="a model's history of requests", description=_DESCRIPTION, formatter_class=form
    )
    actions = own.add_subparsers(title="actions", required=True, metavar=" | ".join(_ACTIONS))
    for name, (call, text, arguments) in _ACTIONS.items():
        action = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        action.set_defaults(command=call)
        action.add_argument("history", help="folder of the history")
        for flag, settings in arguments.items():
            action.add_argument(flag, **settings)


def load_function(place: str, argument: str = "--trainer") -> Callable:
    """A function by its place, as "train.py:make_trainer".

    Raises:
        ValueError: There is no such file, or no such function in it.
    """
    path, _, name = place.partition(":")
    if not name:
        raise ValueError(f"`{argument}` is {place!r}, but names no function of a file: pass FILE.py:FUNCTION.")
    if not Path(path).is_file():
        raise ValueError(f"`{argument}` is {place!r}, but there is no file {path!r}.")
    known = f"_of_{Path(path).resolve()}"
    if known not in sys.modules:  # one file may hold several of the functions
        spec = importlib.util.spec_from_file_location(known, path)
        sys.modules[known] = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(Path(path).resolve().parent))  # as for a script: files beside it may be imported
        spec.loader.exec_module(sys.modules[known])
    module = sys.modules[known]
    if not callable(getattr(module, name, None)):
        raise ValueError(f"`{argument}` is {place!r}, but {path} has no function {name!r}.")
    return getattr(module, name)


def _open(folder: str) -> "RequestHistory":
    from ..requests import RequestHistory

    return RequestHistory(folder)


def _begin(parsed: argparse.Namespace) -> int:
    from ..requests import RequestHistory

    print(f"Begun: {RequestHistory.create(parsed.history, parsed.model).folder}")
    return 0


def _add(parsed: argparse.Namespace) -> int:
    from .rows import load_rows

    forget, retain = (
        None if path is None else load_rows(path, leave_no_copy=True) for path in (parsed.forget, parsed.retain)
    )
    if parsed.drop_sketched and parsed.sketch is None:
        raise ValueError("`--drop_sketched` is given without `--sketch`: name the column to sketch and drop.")
    sketch = None if parsed.sketch is None else _column(forget, parsed.sketch)
    if parsed.drop_sketched:
        forget = forget.remove_columns(parsed.sketch)
        if retain is not None and parsed.sketch in retain.column_names:
            retain = retain.remove_columns(parsed.sketch)
    settings = {"goal": parsed.goal, "request_id": parsed.request_id, "sketch": sketch}
    request = _open(parsed.history).add(forget, retain_dataset=retain, **settings)
    print(f"Added: request {request.number} ({request.request_id}), {request.sizes['forget']} rows.")
    return 0


def _run(parsed: argparse.Namespace) -> int:
    history, make = _open(parsed.history), load_function(parsed.trainer)
    report = None if parsed.report is None else load_function(parsed.report, "--report")
    settings = {"merge": parsed.merge, "hold_earlier": parsed.hold_earlier, "at_most": parsed.at_most}
    if not history.run(make, make_report=report, on_done=_print_done, **settings):
        print("No request was pending.")
    print(f"The model of today: {history.model}")
    return 0


def _print_done(requests: "list[Request]") -> None:
    for request in requests:
        losses = (request.measured[when]["forget_loss"] for when in ("before", "after"))
        line = "Done: request {} ({}); loss on its forget set {:.3f} before, {:.3f} after."
        print(line.format(request.number, request.request_id, *losses), flush=True)


def _status(parsed: argparse.Namespace) -> int:
    history = _open(parsed.history)
    print(f"original: {history.original}")
    for request in history.requests:
        carrier = history.carrier(request)
        if carrier is None:
            state = "begun" if request.has_begun else "pending"
        else:
            state = "done" if carrier == request else f"done with request {carrier.number}, under its salt"
        parts = {"model": request.model if request.model.exists() else None, "rows": request.rows("forget")}
        parts |= {"salt": request.salt(), "sketches": request.sketches()}
        kept = ", ".join(name for name, part in parts.items() if part is not None) or "nothing"
        goal = f"; {request.goal}" * (request.goal is not None)
        print(f"{request.number} {request.request_id}{goal}: {state}; {request.sizes['forget']} rows; kept: {kept}")
    print(f"today: {history.model}")
    return 0


def _check(parsed: argparse.Namespace) -> int:
    make = None if parsed.trainer is None else load_function(parsed.trainer)
    checked = _open(parsed.history).check(make)
    for one in checked:
        print(one)
    if not checked:
        print("No request was carried out yet.")
    return 1 if any(one.problems for one in checked) else 0


def _find(parsed: argparse.Namespace) -> int:
    from .rows import load_rows

    rows = load_rows(parsed.rows, leave_no_copy=True)
    column = None if parsed.column is None else _column(rows, parsed.column)
    found = _open(parsed.history).check_dataset(rows, column=column)
    for one in found:
        likeness = "is in" if one.exact else f"is {one.similarity:.0%} like a row of"
        print(f"Row {one.row} {likeness} request {one.request_id}.")
    print(f"{len({one.row for one in found})} of {len(rows)} rows were asked to be forgotten.")
    return 1 if found else 0


def _roll_back(parsed: argparse.Namespace) -> int:
    history = _open(parsed.history)
    pending = history.roll_back(_number(history, parsed.request))
    print(f"The model of today: {history.model}. Pending again: {[request.number for request in pending]}")
    return 0


def _withdraw(parsed: argparse.Namespace) -> int:
    history = _open(parsed.history)
    number = _number(history, parsed.request)
    history.withdraw(number)
    print(f"Withdrawn: request {number}.")
    return 0


def _delete_data(parsed: argparse.Namespace) -> int:
    history = _open(parsed.history)
    number = _number(history, parsed.request)
    history.delete_data(number, salt=parsed.salt)
    print(f"Deleted: rows of request {number}" + (", and salt and sketches of its run." if parsed.salt else "."))
    return 0


def _number(history: "RequestHistory", given: str) -> int:
    """That of the request that was named by its number or its name."""
    named = {request.request_id: request.number for request in history.requests}
    meant = {int(given)} & {0, *named.values()} if given.isdecimal() else set()
    meant |= {named[given]} if given in named else set()
    if len(meant) != 1:
        why = "is the number of one request and the name of another" if meant else "names no request"
        known = ", ".join(f"{number} ({name})" for name, number in named.items()) or "none"
        raise ValueError(f"`request` is {given!r}, which {why}. The history has {known}: pass what means one of them.")
    return meant.pop()


def _column(rows, name: str):
    if name not in rows.column_names:
        raise ValueError(f"There is no column {name!r}, only {', '.join(rows.column_names)}.")
    return rows[name]


_TRAINER = "function that makes the trainer, as train.py:make_trainer"
_NAMED = {"help": "its number or name, as `status` has them"}
_SWITCH = {"action": "store_true"}
_ACTIONS = {
    "begin": (_begin, "begin a history", {"model": {"help": "the original: a folder, or a model on the Hub"}}),
    "add": (
        _add,
        "take a request in",
        {
            "--forget": {"required": True, "help": "rows to forget"},
            "--retain": {"help": "rows to retain; without, the trainer's maker brings its own"},
            "--goal": {"choices": ["retrained", "erased"], "help": "what the model is to be like"},
            "--request_id": {"help": "name of the request, which is published: not of a person; random by default"},
            "--sketch": {"help": "column of text, tokens or audio by whose sketches near duplicates are found later"},
            "--drop_sketched": _SWITCH
            | {"help": "leave that column out of the rows, as the trainer does not take it"},
        },
    ),
    "run": (
        _run,
        "carry out what is pending, or go on after a kill",
        {
            "--trainer": {"required": True, "help": _TRAINER},
            "--merge": _SWITCH | {"help": "all requests in one run"},
            "--hold_earlier": _SWITCH | {"help": "hold what earlier requests forgot"},
            "--at_most": {"type": int, "metavar": "N", "help": "end after so many runs; all by default"},
            "--report": {
                "help": "function of the trainer and the goal that makes the report after training, as train.py:make_report"
            },
        },
    ),
    "status": (_status, "say how far each request is, and what of it is kept", {}),
    "check": (
        _check,
        "check all requests against the model of today",
        {"--trainer": {"help": f"measure their rows again: {_TRAINER}"}},
    ),
    "find": (
        _find,
        "find rows of new data that were asked to be forgotten",
        {
            "--rows": {"required": True, "help": "new data, prepared as the forget sets were"},
            "--column": {"help": "of text, tokens or audio: look for near duplicates, too"},
        },
    ),
    "roll_back": (
        _roll_back,
        "make the model after a request that of today, and delete later models and reports",
        {"request": _NAMED | {"help": _NAMED["help"] + "; 0: the original"}},
    ),
    "withdraw": (_withdraw, "delete a request that is pending", {"request": _NAMED}),
    "delete_data": (
        _delete_data,
        "delete the rows of a request that was carried out",
        {"request": _NAMED, "--salt": _SWITCH | {"help": "and what its commitments are checked by"}},
    ),
}
