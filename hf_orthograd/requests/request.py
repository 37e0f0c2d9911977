"""One request of a history: what was asked, where its files lie, and how far it has come."""

import json
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from datasets import Dataset, load_from_disk

from ..publishing import SALT_NAME, owner_salt, read_salt
from .duplicates import Sketches


REQUEST_NAME, PLAN_NAME = "request.json", "plan.json"
MEASURED_NAME, SKETCHES_NAME = "measured.json", "sketches.npz"
PRIVATE, RUN, MODEL = "private", "run", "model"


@dataclass
class Request:
    """A request to forget, as its folder has it.

    Attributes:
        number (`int`): Its place in the history, from 1.
        request_id (`str`): The owner's name for it. No name of a person belongs here.
        goal (`str`, *optional*): "retrained" or "erased".
        added (`str`): When, ISO 8601, UTC.
        sizes (`dict[str, int]`): Rows to forget, and rows to retain that came with the request.
        folder (`Path`): Of its files.
    """

    number: int
    request_id: str
    goal: str | None
    added: str
    sizes: dict[str, int]
    folder: Path = field(compare=False)

    @classmethod
    def write(
        cls,
        folder: Path,
        number: int,
        request_id: str,
        goal: str | None,
        forget: Dataset,
        retain: Dataset | None,
        sketched: Iterable | None,
    ) -> "Request":
        """Makes the folder, whole or not at all; of `sketched`, a column, it keeps what finds near duplicates."""
        partial = folder.with_name(f"{folder.name}.partial")
        if partial.exists():
            shutil.rmtree(partial)
        try:
            _write_private(partial / PRIVATE, forget, retain, sketched)
        except Exception:
            shutil.rmtree(partial)  # it holds rows and a salt
            raise
        sizes = {"forget": len(forget), "retain": 0 if retain is None else len(retain)}
        added = datetime.now(timezone.utc).isoformat(timespec="seconds")
        request = cls(number, request_id, goal, added, sizes, folder)
        content = {name: value for name, value in asdict(request).items() if name != "folder"}
        write_json(partial / REQUEST_NAME, content)
        partial.rename(folder)
        return request

    @classmethod
    def read(cls, folder: Path) -> "Request":
        return cls(**json.loads((folder / REQUEST_NAME).read_text()), folder=folder)

    @property
    def model(self) -> Path:
        """The model after this request, if it was carried out by a run of its own."""
        return self.folder / MODEL

    @property
    def run_folder(self) -> Path:
        """`output_dir` of the run, until it is over."""
        return self.folder / RUN

    @property
    def private(self) -> Path:
        """What stays with the owner."""
        return self.folder / PRIVATE

    @property
    def plan(self) -> dict | None:
        """Of the run that was begun for it: the requests it carries out, where it starts, what it holds."""
        path = self.folder / PLAN_NAME
        return json.loads(path.read_text()) if path.exists() else None

    @property
    def has_begun(self) -> bool:
        """Whether a run was begun for it that has something to go on from."""
        return self.plan is not None and any(self.run_folder.glob("checkpoint-*"))

    @property
    def measured(self) -> dict[str, dict[str, float]]:
        """Metrics on its forget set before and after its run, for the owner alone."""
        path = self.private / MEASURED_NAME
        return json.loads(path.read_text()) if path.exists() else {}

    def rows(self, name: str) -> Dataset | None:
        """Its "forget" or "retain" set; `None` if there was none, or it was deleted."""
        path = self.private / name
        return load_from_disk(str(path)) if path.exists() else None

    def sketches(self) -> Sketches | None:
        """What finds near duplicates of its rows, if it was kept."""
        path = self.private / SKETCHES_NAME
        return Sketches.load(path) if path.exists() else None

    def salt(self) -> bytes | None:
        """That its rows are committed to with, if it was not deleted."""
        path = self.private / SALT_NAME
        return read_salt(path) if path.exists() else None


def _write_private(folder: Path, forget: Dataset, retain: Dataset | None, sketched: Iterable | None) -> None:
    folder.mkdir(parents=True)
    forget.save_to_disk(folder / "forget")
    if retain is not None:
        retain.save_to_disk(folder / "retain")
    salt = owner_salt(folder)
    if sketched is not None:
        if isinstance(sketched, str):
            raise ValueError(
                f"`sketch` is {sketched!r}, but takes the values of a column: pass `dataset[{sketched!r}]`."
            )
        sketches = Sketches.of(sketched, salt)
        if len(sketches) != len(forget):
            raise ValueError(
                f"`sketch` has {len(sketches)} values, but `forget_dataset` has {len(forget)} rows: pass a column of the same rows."
            )
        sketches.save(folder / SKETCHES_NAME)


def write_json(path: Path, content: Mapping) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def check_kept(name: str, rows: object) -> None:
    """Checks that files can keep a set.

    Raises:
        ValueError: It is no `datasets.Dataset`, or has a transform.
    """
    if not isinstance(rows, Dataset):
        raise ValueError(f"`{name}` is a {type(rows).__name__}, but is kept as files: pass a datasets.Dataset.")
    if rows.format["type"] == "custom":
        raise ValueError(f"`{name}` has a transform, which no file keeps: set it in `make_trainer`.")


def remove(path: Path) -> None:
    """Takes a file or folder away in one step, then deletes it."""
    if not path.exists():
        return
    if path.suffix != ".removed":
        path = path.rename(path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.removed"))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
