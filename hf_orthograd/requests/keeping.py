"""The files of a history change in one process at a time, the first of a launch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from transformers.utils import CONFIG_NAME, cached_file, logging

from ..parallel import ProcessGroup
from ..publishing import is_weights, load_records, published_files
from ..publishing.record import records_on_hub
from .request import Request, remove


logger = logging.get_logger(__name__)

HISTORY_NAME, ORIGINAL, REQUESTS = "history.json", "original", "requests"
CHECKED = "checked"  # `output_dir` of trainers that only measure
_ADDING = ".adding.lock"
Result = TypeVar("Result")


def in_first(call: Callable[[], Result]) -> Result:
    """What the call gives in the first process, in all of them, which wait for it.

    Raises:
        RuntimeError: In the others, where it failed there; the first raises what was raised.
    """
    # a launch on CPUs is told from no launch by that alone; where there is a state already, it is that one
    state = PartialState(cpu=not torch.accelerator.is_available())
    group = ProcessGroup(state.num_processes, state.process_index)
    return group.agree(group.in_first(call))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds a history's lock in the first process of a launch; the system lets it go where a process is killed.

    Raises:
        ValueError: Another launch holds it.
    """
    lock = FileLock(folder / ".lock")

    def acquire() -> None:
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise ValueError(
                f"Another process carries out or changes requests of {str(folder)!r}: it holds {lock.lock_file}. Wait for it, or end it."
            ) from error

    in_first(acquire)
    try:
        yield
    finally:
        lock.release()


def adding_to(folder: Path) -> FileLock:
    """The lock of those who add a request, which a run does not keep from it."""
    return FileLock(folder / _ADDING)


def tidy(folder: Path, requests: list[Request], is_over: Callable[[Request], bool]) -> None:
    """Removes what a run that is over, or anything that was killed, left behind."""
    with suppress(Timeout), adding_to(folder).acquire(blocking=False):  # what is being added now is not left behind
        for path in (folder / REQUESTS).glob("*.partial"):
            remove(path)
    for path in folder.rglob("*.removed"):
        remove(path)
    for request in requests:
        if request.plan is None or is_over(request):
            remove(request.run_folder)


def describe_original(model: str | Path) -> tuple[list[str], dict]:
    """What to copy of the model that a history begins with, and what to write down of it.

    Returns:
        Names of a folder's files, of a model on the Hub none; and the content of history.json.

    Raises:
        ValueError: The folder holds no weights, or no such model is to be had.
    """
    if Path(model).is_dir():
        names = published_files(Path(model))
        if not any(map(is_weights, names)):
            raise ValueError(f"`model` {str(model)!r} holds no weights in safetensors: save it by `save_pretrained`.")
        return names, {"original": None, "records": len(load_records(model))}
    try:
        commit = _commit_of(str(model))
    except OSError as error:
        raise ValueError(
            f"`model` is {str(model)!r}, which is no folder, and was not found on the Hub: {str(error).splitlines()[0]} Pass a folder, or "
            "a model's name as `from_pretrained` takes it; log in if it is private."
        ) from error
    return [], {"original": str(model), "revision": commit, "records": len(records_on_hub(str(model), commit))}


def warn_of_other_original(described: dict) -> None:
    """Warns where the original's name on the Hub is that of another commit than when the history began."""
    if "revision" not in described:
        return
    name, then = described["original"], described["revision"]
    try:
        now = _commit_of(name)
    except OSError:  # `make_trainer` may load a commit that is kept here
        logger.warning(f"Whether the original, {name!r}, is still at commit {then} could not be looked up.")
        return
    if now != then:
        logger.warning(
            f"The original, {name!r}, was at commit {then} when this history began, and is now at {now}: have `make_trainer` load the "
            "former by `revision`."
        )


def _commit_of(name: str) -> str:
    return Path(cached_file(name, CONFIG_NAME)).parent.name  # a snapshot's folder bears it
