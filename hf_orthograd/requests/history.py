"""A model and the requests that it went through, in one folder of plain files.

    history.json            the original model
    .lock                   held while requests are carried out or changed
    original/               a copy of it, if it was a folder
    requests/0001/
      request.json          what was asked, without names or rows
      plan.json             what its run carries out
      private/              forget set, retain set, salt, report, metrics: for the owner alone
      run/                  output_dir of the run, until it is over
      model/                weights, card, public report and record: may be published

A request is done once `model/` is there, which appears in one step: a kill leaves it undone or done, never half done.
"""

import itertools
import json
import shutil
import uuid
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import default_data_collator
from transformers.utils import logging

from .. import publishing
from . import keeping, undoing
from .checks import CheckedRequest, check_record, find_rows, lost_requests, warn_of_earlier
from .duplicates import FoundRow
from .keeping import HISTORY_NAME, ORIGINAL, REQUESTS, alone_in, in_first
from .request import PLAN_NAME, Request, check_kept, remove, write_json
from .running import MakeReport, MakeTrainer, carry_out, check_one_goal, joined, measure_rows, naming
from .staying import StaysForgotten


logger = logging.get_logger(__name__)

GOALS = (None, "retrained", "erased")


class RequestHistory:
    """What a model was asked to forget, and what became of it.

    Args:
        folder (`str`): That [`create`] made.

    Attributes:
        folder (`Path`): The same.

    Raises:
        ValueError: The folder holds no history.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / HISTORY_NAME).exists():
            raise ValueError(
                f"`folder` {str(folder)!r} holds no {HISTORY_NAME}: `RequestHistory.create(folder, model)`, or `hf-orthograd requests "
                "begin`, begins a history."
            )

    @classmethod
    def create(cls, folder: str | Path, model: str | Path) -> "RequestHistory":
        """Begins a history.

        Args:
            folder (`str`): A new folder.
            model (`str`): The original: a folder, which is copied, or a model's name on the Hub.

        Raises:
            ValueError: There is something in the folder already, the model's folder holds no weights, or the Hub has no such
                model.
        """
        folder = Path(folder)

        def write() -> None:
            if folder.exists() and any(folder.iterdir()):
                raise ValueError(f"`folder` {str(folder)!r} is not empty. Name a new one for the history.")
            names, described = keeping.describe_original(model)
            unfinished = folder.with_name(f"{folder.name}.partial")
            if unfinished.exists():
                shutil.rmtree(unfinished)
            (unfinished / REQUESTS).mkdir(parents=True)
            for name in names:
                target = unfinished / ORIGINAL / name
                target.parent.mkdir(exist_ok=True)
                shutil.copy2(Path(model, name), target)
            write_json(unfinished / HISTORY_NAME, described)
            if folder.exists():
                folder.rmdir()
            unfinished.rename(folder)

        in_first(write)
        return cls(folder)

    # ---- What is there ----

    @property
    def requests(self) -> list[Request]:
        """All, the oldest first."""
        return [Request.read(path) for path in sorted((self.folder / REQUESTS).glob("[0-9]" * 4))]

    @property
    def original(self) -> str:
        """The model before any request, as `from_pretrained` takes it."""
        return self._begun_with["original"] or str(self.folder / ORIGINAL)

    @property
    def records_before(self) -> int:
        """How many records the original brought along, which are of no request of this history."""
        begun_with = self._begun_with
        return begun_with["records"] if "records" in begun_with else len(publishing.load_records(self.original))

    @property
    def _begun_with(self) -> dict:
        return json.loads((self.folder / HISTORY_NAME).read_text())

    @property
    def model(self) -> str:
        """The model after all that was done, as `from_pretrained` takes it."""
        kept = [request for request in self.requests if request.model.exists()]
        return str(kept[-1].model) if kept else self.original

    def request(self, number: int) -> Request:
        """That of a number.

        Raises:
            ValueError: There is none.
        """
        found = {request.number: request for request in self.requests}
        if number not in found:
            raise ValueError(f"`number` is {number}, but the history has requests {sorted(found)}.")
        return found[number]

    def carrier(self, request: Request) -> Request | None:
        """The request whose run carried this one out: itself, or a later one that it was merged into.

        A model that is there tells that all runs before it are over, also where their models were deleted.
        """
        requests = self.requests
        last = max((other.number for other in requests if other.model.exists()), default=0)
        for other in requests:
            if other.number <= last and other.plan is not None and request.number in other.plan["numbers"]:
                return other
        return None

    def pending(self) -> list[Request]:
        """Those that no run has carried out."""
        return [request for request in self.requests if self.carrier(request) is None]

    # ---- What is done ----

    def add(
        self,
        forget_dataset: Dataset,
        *,
        retain_dataset: Dataset | None = None,
        goal: str | None = None,
        request_id: str | None = None,
        sketch: Iterable | None = None,
    ) -> Request:
        """Takes a request in, to be carried out by [`run`].

        Args:
            forget_dataset (`Dataset`): Rows as the trainer will take them; a copy is kept until [`delete_data`].
            retain_dataset (`Dataset`, *optional*): To be kept with it; without, the trainer's maker brings its own.
            goal (`str`, *optional*): "retrained" or "erased".
            request_id (`str`, *optional*): Random by default. No name of a person belongs here: it is published.
            sketch (`Iterable`, *optional*): A column with text, tokens or audio, by whose [`Sketches`] near duplicates are found
                later, also when the rows were deleted.

        Raises:
            ValueError: No rows, another goal, a name that is taken, a `sketch` of other rows. A warning tells of rows that an earlier request names.
        """
        check_kept("forget_dataset", forget_dataset)
        if retain_dataset is not None:
            check_kept("retain_dataset", retain_dataset)
        if len(forget_dataset) == 0:
            raise ValueError("`forget_dataset` is empty: there is nothing to forget.")
        if goal not in GOALS:
            raise ValueError(f"`goal` must be 'retrained' or 'erased', or left out, but is {goal!r}.")
        if request_id is not None and "," in request_id:
            raise ValueError(f"`request_id` is {request_id!r}, but a comma stands between those of a merged run.")

        def write() -> Request:
            with keeping.adding_to(self.folder):
                before = self.requests
                if request_id in {request.request_id for request in before}:
                    raise ValueError(f"`request_id` {request_id!r} is that of an earlier request. Choose another.")
                warn_of_earlier(self, forget_dataset)
                number = before[-1].number + 1 if before else 1
                folder = self.folder / REQUESTS / f"{number:04d}"
                named = request_id or uuid.uuid4().hex
                return Request.write(folder, number, named, goal, forget_dataset, retain_dataset, sketch)

        return in_first(write)

    def run(
        self,
        make_trainer: MakeTrainer,
        *,
        merge: bool = False,
        hold_earlier: bool = False,
        make_report: MakeReport | None = None,
        at_most: int | None = None,
        on_done: Callable[[list[Request]], object] | None = None,
    ) -> list[Request]:
        """Carries out what is pending, one request after the other; a run that was killed goes on first, as it was planned.

        Warnings tell of rows to retain that an earlier request forgot, and of earlier requests whose rows a run brought back.

        Args:
            make_trainer (`Callable`): `make_trainer(model, forget, retain, output_dir)` returns an [`OrthoGradTrainer`] of the
                model in that folder with those sets and `OrthoGradConfig(output_dir, ...)`. The same call must give the same
                trainer. With checkpoints a run that was killed goes on from the last one.
            merge (`bool`): All in one run.
            hold_earlier (`bool`): Retain rows are joined by what earlier requests forgot, held to the last model's predictions,
                so that it does not come back. It needs those rows, `retain_loss="kl"`, and no `ref_model`.
            make_report (`Callable`, *optional*): `make_report(trainer, goal)` returns the report of the trainer after training, by
                [`~hf_orthograd.evaluation.evaluate_unlearning`]; `goal` is the request's. Its public edition is published.
            at_most (`int`, *optional*): Ends after so many runs; by default when nothing is pending.
            on_done (`Callable`, *optional*): Called after each run with the requests that it carried out.

        Returns:
            `list[Request]`: Those carried out.

        Raises:
            ValueError: The model of today is not as it was recorded, the trainer is not of this request or not that which its run
                began with, requests to be merged have several goals, `at_most` is below 1, or another process carries requests out.
        """
        if at_most is not None and at_most < 1:
            raise ValueError(f"`at_most` must be 1 or more, or left out to carry all out, but is {at_most}.")
        done: list[Request] = []
        with alone_in(self.folder):
            in_first(self.tidy)
            for _ in itertools.count() if at_most is None else range(at_most):
                requests = self._run_next(make_trainer, merge, hold_earlier, make_report)
                if not requests:
                    break
                done += requests
                if on_done is not None:
                    on_done(requests)
        return done

    def _run_next(
        self, make_trainer: MakeTrainer, merge: bool, hold_earlier: bool, make_report: MakeReport | None
    ) -> list[Request]:
        """One run, and what it carried out."""
        # one process says what comes next: a request may be added at any moment
        number = in_first(partial(self._begin_next, merge, hold_earlier))
        if number is None:
            return []
        begun = self.request(number)
        requests = [self.request(number) for number in begun.plan["numbers"]]
        check_one_goal(requests)
        others = [request for request in self.requests if request.number < requests[0].number]
        earlier = others if begun.plan["hold_earlier"] else []
        source = self.model
        if source == self.original:
            in_first(partial(keeping.warn_of_other_original, self._begun_with))
        elif problems := publishing.verify(source):
            raise ValueError(f"The model to start from, {source!r}, is not as recorded: {'; '.join(problems)}.")
        with naming(requests):
            carry_out(self, begun, requests, earlier, source, make_trainer, make_report)
        in_first(self.tidy)
        return requests

    def _begin_next(self, merge: bool, hold_earlier: bool) -> int | None:
        """The number of the request in whose folder the next run takes place, with its plan made; None if nothing is pending."""
        pending, asked = self.pending(), {"merge": merge, "hold_earlier": hold_earlier}
        if not pending:
            return None
        begun = next((request for request in pending if request.has_begun), None)
        if begun is None:  # a plan that came to nothing, as its arguments were refused, is made anew
            numbers = [request.number for request in pending] if merge else [pending[0].number]
            self._make_plan(self.request(numbers[-1]), {"numbers": numbers, **asked})
            return numbers[-1]
        if not asked.items() <= begun.plan.items():
            logger.warning(
                f"The run of requests {begun.plan['numbers']} goes on as it was planned, with merge="
                f"{begun.plan['merge']} and hold_earlier={begun.plan['hold_earlier']}. `roll_back` to the request before it begins it anew."
            )
        return begun.number

    def check(self, make_trainer: MakeTrainer | None = None) -> list[CheckedRequest]:
        """All requests that were carried out, against the model of today.

        Args:
            make_trainer (`Callable`, *optional*): As in [`run`]: then each request's forget set, if it is kept, is measured again.

        Returns:
            [`CheckedRequest`] for each: what differs from the records, and metrics before, after and now.
        """
        problems = publishing.verify(self.model) if self.model != self.original else []
        lost = "its folder is gone from the history, but the model's records name it"
        checked = [CheckedRequest(number, name, [lost], {}, None) for number, name in lost_requests(self)]
        for request in self.requests:
            carrier = self.carrier(request)
            if carrier is None:
                continue
            now, forget = None, request.rows("forget")
            found = check_record(request, carrier, Path(self.model), measures=make_trainer is not None)
            if make_trainer is not None and forget is not None:
                trainer = make_trainer(self.model, forget, request.rows("retain"), str(self.folder / keeping.CHECKED))
                now = measure_rows(trainer, forget)
            about = request.number, request.request_id, [*problems, *found[0]], request.measured, now, found[1]
            checked.append(CheckedRequest(*about))
        in_first(partial(remove, self.folder / keeping.CHECKED))
        return checked

    def check_dataset(self, dataset: Dataset, *, column: Iterable | None = None) -> list[FoundRow]:
        """Rows that any request, carried out or not, asked to forget, before a model is trained on them.

        Args:
            dataset (`Dataset`): Prepared as the forget sets were. Exact rows are found by a request's salt, if it was carried
                out, or by its rows.
            column (`Iterable`, *optional*): Of the same rows: near duplicates are looked for where a request has sketches.

        Returns:
            [`FoundRow`] for each row and request, the most similar first. A warning says what could not be looked for.

        Raises:
            ValueError: `column` has another length, or the rows lack columns by which a request knows its own.
        """
        return find_rows(self, dataset, column)

    def stays_forgotten(self, data_collator: Callable = default_data_collator, **settings: Any) -> StaysForgotten:
        """A callback for any Trainer that trains the model of today on: it watches, or holds, what all requests forgot.

        Args:
            data_collator (`Callable`): Makes batches of their rows.
            settings: As [`StaysForgotten`] takes them.

        Raises:
            ValueError: No request was carried out whose rows are kept.
        """
        done = {
            request.number: request.rows("forget") for request in self.requests if self.carrier(request) is not None
        }
        if lost := [number for number, rows in done.items() if rows is None]:
            logger.warning(f"Requests {lost} are not watched: their rows were deleted.")
        rows = joined(list(done.values()))
        if rows is None:
            raise ValueError("No request was carried out whose rows are kept. Pass other rows to `StaysForgotten`.")
        return StaysForgotten(rows, data_collator, **settings)

    def roll_back(self, number: int) -> list[Request]:
        """Makes the model after request `number` that of today, 0 for the original; later requests are pending again.

        Models of later requests are deleted. What they had forgotten is in the model again, until [`run`].

        Raises:
            ValueError: No model was kept after that request, or it is not as recorded; or rows of a later one were deleted: it
                could not be carried out again.
        """
        with alone_in(self.folder):
            return in_first(partial(undoing.roll_back, self, number))

    def withdraw(self, number: int) -> None:
        """Deletes a request that is pending.

        Raises:
            ValueError: There is no such request, or a run has begun or ended with it.
        """
        with alone_in(self.folder):
            in_first(partial(undoing.withdraw, self, number))

    def delete_data(self, number: int, *, salt: bool = False) -> None:
        """Deletes the rows of a request that was carried out.

        Args:
            number (`int`): Of the request.
            salt (`bool`): Also that which its commitments can be checked by, and its sketches. Requests that were merged share
                the salt of the last of them: with it go their sketches, and salts of their own.

        Raises:
            ValueError: There is no such request, it is pending, its rows are held by a run that has begun, or its salt is that
                of another.
        """
        with alone_in(self.folder):
            in_first(partial(undoing.delete_data, self, number, salt))

    def _make_plan(self, carrier: Request, plan: dict) -> None:
        for request in self.pending():
            (request.folder / PLAN_NAME).unlink(missing_ok=True)
        write_json(carrier.folder / PLAN_NAME, plan)

    def tidy(self) -> None:
        """Removes what a run that is over, or anything that was killed, left behind."""
        keeping.tidy(self.folder, self.requests, lambda request: self.carrier(request) is not None)
