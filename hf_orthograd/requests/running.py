"""One run of a history: from the model that the request before left to the one that this request leaves."""

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers.utils import logging

from .. import publishing
from ..checkpoints import find_last_checkpoint
from ..evaluation import UnlearningReport, per_sample_losses
from ..trainer import OrthoGradTrainer
from ..trials import preserved_random_state, replaced
from ..validation import row_digest, stored_row
from .checks import CheckedRequest, warn_of_return, warn_of_taught
from .request import MEASURED_NAME, Request, write_json


if TYPE_CHECKING:
    from .history import RequestHistory


logger = logging.get_logger(__name__)

SETTINGS_NAME = "settings.json"  # in a run's folder: those that it began with
MakeReport = Callable[[OrthoGradTrainer, str | None], UnlearningReport]
MakeTrainer = Callable[[str, Dataset, Dataset | None, str], OrthoGradTrainer]


def carry_out(
    history: "RequestHistory",
    carrier: Request,
    requests: Sequence[Request],
    earlier: Sequence[Request],
    source: str,
    make_trainer: MakeTrainer,
    make_report: MakeReport | None,
) -> None:
    """Trains, goes on from a checkpoint if there is one, and publishes into the carrier's folder in one step.

    Args:
        history ([`RequestHistory`]): Of the requests.
        carrier ([`Request`]): In whose folder the run takes place.
        requests (`Sequence[Request]`): Those that the run carries out.
        earlier (`Sequence[Request]`): Those whose forgotten rows are held.
        source (`str`): The model to start from.
    """
    if make_report is not None:
        try:
            inspect.signature(make_report).bind(None, None)
        except TypeError as error:
            raise ValueError(f"`make_report` must take the trainer and the goal, but: {error}.") from error
    sets = {request.number: request.rows("forget") for request in requests}
    lost = [number for number, rows in sets.items() if rows is None]
    if lost:
        raise ValueError(f"The rows of requests {lost} are not there: they cannot be carried out.")
    forget, retain = joined(list(sets.values())), joined([request.rows("retain") for request in requests])
    trainer = make_trainer(source, forget, retain, str(carrier.run_folder))
    _check_trainer(trainer, forget, carrier)
    done = [request for request in history.requests if history.carrier(request) is not None]
    trainer.group.in_first(partial(warn_of_taught, history, trainer.train_dataset, done))
    if earlier:
        _hold(trainer, earlier)
    begun = any(carrier.run_folder.glob("checkpoint-*"))
    _keep_settings(trainer, carrier.run_folder / SETTINGS_NAME, begun)
    before = {number: measure_rows(trainer, rows) for number, rows in sets.items()}
    trainer.train(resume_from_checkpoint=find_last_checkpoint(str(carrier.run_folder)) if begun else None)
    after = {number: measure_rows(trainer, rows) for number, rows in sets.items()}
    _look_back(trainer, done, forget.column_names)
    report = None if make_report is None else make_report(trainer, carrier.goal)
    if report is not None and carrier.goal not in (None, report.goal):
        raise ValueError(
            f"`make_report` returned a report with the goal {report.goal!r}, but that of the request is {carrier.goal!r}: pass `goal` to "
            "`evaluate_unlearning`, and call `run` again, which goes on from the last checkpoint."
        )

    def keep() -> None:
        shutil.copy2(carrier.private / publishing.SALT_NAME, carrier.run_folder)
        for request in requests:
            measured = {"before": before[request.number], "after": after[request.number]}
            write_json(request.private / MEASURED_NAME, measured)
        if report is not None:
            report.save(carrier.private)

    trainer.group.in_first(keep)
    name = ", ".join(request.request_id for request in requests)
    public = publishing.prepare_folder(trainer, report=report, request_id=name, goal=carrier.goal)
    trainer.group.in_first(lambda: public.rename(carrier.model))


@contextmanager
def naming(requests: Sequence[Request]) -> Iterator[None]:
    """Says in an error of the library's which requests were not carried out: a history may have many."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        told = ", ".join(f"{request.number} ({request.request_id})" for request in requests)
        error.args = (f"Not carried out: {told}. {error}",)
        raise


def _look_back(trainer: OrthoGradTrainer, done: Sequence[Request], columns: Sequence[str]) -> None:
    """Measures what earlier requests forgot, where their rows are kept, and warns where the run brought it back."""
    for request in done:
        rows = request.rows("forget")
        if rows is None:
            continue
        if set(rows.column_names) != set(columns):  # this trainer may not take them, and the run is over
            logger.warning(
                f"Whether the run brought back what request {request.number} asked to forget is not measured: its rows have the columns "
                f"{rows.column_names}, those of the run {list(columns)}. `check` makes a trainer for each."
            )
            continue
        now = measure_rows(trainer, rows)
        if trainer.is_world_process_zero():
            warn_of_return(CheckedRequest(request.number, request.request_id, [], request.measured, now))


def _hold(trainer: OrthoGradTrainer, earlier: Sequence[Request]) -> None:
    """Adds the forgotten rows of earlier requests to what the trainer keeps as it is."""
    if not trainer.args.keeps_predictions:
        raise ValueError(
            "`hold_earlier` is True, which holds what earlier requests forgot by `retain_loss`='kl' with `alpha` above 0; other "
            f"settings would teach it again. They are {trainer.args.retain_loss!r} and {trainer.args.alpha}."
        )
    if trainer.ref_model is not None:
        raise ValueError(
            "`hold_earlier` is True, and the trainer has a `ref_model`, whose predictions the rows of earlier requests would be held to: "
            "a model from before them knows them. Leave one of the two out."
        )
    rows = {request.number: request.rows("forget") for request in earlier}
    missing = [number for number, own in rows.items() if own is None]
    if missing:
        raise ValueError(f"`hold_earlier` is True, but the rows of requests {missing} were deleted. Leave it out.")
    retain = trainer.train_dataset
    if not isinstance(retain, Dataset):
        raise ValueError(
            f"`hold_earlier` is True, but `train_dataset` is a {type(retain).__name__}: make it a datasets.Dataset."
        )
    absent = {name: set(retain.column_names) - set(own.column_names) for name, own in rows.items()}
    if any(absent.values()):
        raise ValueError(
            f"`hold_earlier` is True, but rows of earlier requests lack columns of `train_dataset`: {absent}."
        )
    shown = retain.format
    held = [own.with_format(None).select_columns(retain.column_names).cast(retain.features) for own in rows.values()]
    plain = [retain.with_format(None), *held]
    shown = {**shown.pop("format_kwargs"), **shown}  # as the retain rows are shown, or varied
    trainer.train_dataset = concatenate_datasets(plain).with_format(**shown)


def joined(sets: list[Dataset | None]) -> Dataset | None:
    found = [rows for rows in sets if rows is not None]
    return concatenate_datasets(found) if found else None


def measure_rows(trainer: OrthoGradTrainer, rows: Dataset) -> dict[str, float]:
    """The trainer's metrics on the rows without what tells of time; "forget_loss" is the mean over rows, not Trainer's over batches."""
    with preserved_random_state(), replaced(trainer, "log", lambda *logs, **kwargs: None):
        found = trainer.evaluate(rows, metric_key_prefix="forget")
        found["forget_loss"] = float(per_sample_losses(trainer, rows).mean())
    slow = ("_runtime", "_per_second", "_preparation_time")
    return {name: value for name, value in found.items() if not name.endswith(slow)}


def _check_trainer(trainer: OrthoGradTrainer, forget: Dataset, carrier: Request) -> None:
    if Path(trainer.args.output_dir) != carrier.run_folder:
        raise ValueError(
            f"`make_trainer` returned a trainer whose `output_dir` is {trainer.args.output_dir!r}, not the one that it was given, "
            f"{str(carrier.run_folder)!r}."
        )
    found = 0 if trainer.forget_dataset is None else len(trainer.forget_dataset)
    if found != len(forget):
        raise ValueError(
            f"`make_trainer` returned a trainer that forgets {found} rows, but the request has {len(forget)}. Pass it `forget` "
            "as `forget_dataset`."
        )


def check_one_goal(requests: Sequence[Request]) -> None:
    """Checks that one run can carry the requests out.

    Raises:
        ValueError: They have several goals.
    """
    goals = {request.number: request.goal for request in requests}
    if len(set(goals.values())) > 1:
        raise ValueError(
            f"`merge` is True, but the requests have several goals, {goals}, and a run has one. Leave `merge` out, or `withdraw` and add "
            "them with the same goal. `roll_back` undoes a run that has begun."
        )


# arguments that say where files lie, what is shown, and how data is loaded, and not what the weights become
_WITHOUT_EFFECT = (
    "output_dir",
    "run_name",
    "local_rank",
    "disable_tqdm",
    "report_to",
    "project",
    "dataloader_num_workers",
)
_PREFIXES_WITHOUT_EFFECT = (
    "log",
    "save_",
    "hub_",
    "push_to_hub",
    "dataloader_p",
    "per_device_eval",
    "eval_accumulation",
)

_COMPARED = 32  # retain rows: those of a large set of pictures or speech take long to read


def _keep_settings(trainer: OrthoGradTrainer, path: Path, begun: bool) -> None:
    """Writes down what a run begins with; one that goes on must go on with the same, as its record tells of one trainer."""
    retain = trainer.train_dataset
    given = {
        name: value
        for name, value in trainer.args.to_dict().items()
        if name not in _WITHOUT_EFFECT and not name.startswith(_PREFIXES_WITHOUT_EFFECT)
    }
    given |= {"processes": trainer.args.world_size, "trainer": type(trainer).__name__}
    given["retain rows"] = len(retain) if hasattr(retain, "__len__") else None
    if isinstance(retain, Dataset):
        given["digest of retain rows"] = _digest(retain)
    given = json.loads(json.dumps(given, default=lambda value: type(value).__name__))
    if not begun:
        trainer.group.in_first(partial(_write_settings, path, given))
        return
    if not path.exists():  # it was begun before they were kept
        logger.warning(
            f"{path} is not there: whether the run goes on with the settings that it began with is not checked."
        )
        return
    kept = json.loads(path.read_text())
    changed = [name for name in sorted(kept.keys() & given) if kept[name] != given[name]]
    if changed:
        told = "; ".join(f"{name} {given[name]!r}, not {kept[name]!r}" for name in changed)
        raise ValueError(
            f"`make_trainer` returned another trainer than the run began with: {told}. Return that one, or `roll_back` to the request "
            "before, which begins the run anew."
        )


def _digest(rows: Dataset) -> str:
    """Of up to 32 rows, evenly spaced, as they are stored, before any variation: another set or order shows there, a few changed rows seldom."""
    places = np.linspace(0, len(rows) - 1, min(len(rows), _COMPARED)).astype(int)
    digests = b"".join(row_digest(stored_row(rows, int(place)), None) for place in places)
    return hashlib.sha256(digests).hexdigest()


def _write_settings(path: Path, settings: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    write_json(path, settings)
