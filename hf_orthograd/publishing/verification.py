"""Whether a published model is what its record says."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import snapshot_download

from ..evaluation import UnlearningReport
from .files import REPORT_FILES, UNRECORDED, may_be_loaded
from .record import UnlearningRecord, hashes_of, load_records


def verify(
    folder_or_repo_id: str | Path,
    *,
    salt: bytes | None = None,
    row: Mapping | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> list[str]:
    """Checks whatever of a model is loaded, the report and the chain of records, and whether a row was in a request.

    Who changes a model and its newest record together is found by the owner's salt, or by a signature, and not without.

    Args:
        folder_or_repo_id (`str` or `Path`): A folder, or a model on the Hub, which is downloaded.
        salt (`bytes`, *optional*): The owner's, from [`read_salt`]: then the records' seals are checked.
        row (`Mapping`, *optional*): Of the forget set, as it is stored, from [`~hf_orthograd.validation.stored_row`]; needs
            the salt. Earlier requests have the salt that they were made with.

    Returns:
        `list[str]`: What differs, each in words. Empty if all is as recorded.

    Raises:
        ValueError: There is a row without the salt, or the record cannot be read.
    """
    if salt is None and row is not None:
        raise ValueError("Whether a row was in a request is known to who has the salt alone: pass `salt`, too.")
    folder = Path(folder_or_repo_id)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(folder_or_repo_id), revision=revision, token=token))
    problems = verify_folder(folder)
    if salt is None:
        return problems
    sealed = [record for record in load_records(folder) if record.is_sealed_by(salt)]
    if not sealed:
        problems.append("no record carries the seal of this salt: it was changed, or the salt is another")
    for record in sealed if row is not None else ():
        missing = set(record.committed_columns or ()) - set(row)
        if missing:
            raise ValueError(
                f"`row` has no column {', '.join(sorted(missing))}, by which request {record.request_id!r} knows its rows: prepare it as "
                "the forget set was."
            )
    if row is not None and not any(record.includes(row, salt) for record in sealed):
        problems.append("the row is in no request under this salt")
    return problems


def verify_folder(folder: Path) -> list[str]:
    """What differs between a folder and its record."""
    records = load_records(folder)
    if not records:
        return ["there is no unlearning_record.json"]
    newest = records[-1]
    problems = [*_breaks(records)]
    if not newest.weights:
        problems.append("the record names no weights")
    report = {} if newest.report is None else {REPORT_FILES[0]: newest.report}
    found = hashes_of(folder, _recorded_names(folder))
    problems += _differences(found, newest.weights | newest.files | report)
    text = folder / REPORT_FILES[1]
    if text.exists() and not (report and found.get(REPORT_FILES[0]) == newest.report):
        problems.append(f"{text.name} has no report that was recorded beside it")
    elif text.exists() and text.read_text() != UnlearningReport.load(folder).to_markdown() + "\n":
        problems.append(f"{text.name} does not say what {REPORT_FILES[0]} says")
    return problems


def _breaks(records: list[UnlearningRecord]) -> Iterator[str]:
    before: str | None = None
    for number, record in enumerate(records, start=1):
        if record.previous != before:
            yield (
                f"the chain is broken before request {record.request_id!r}, number {number}: a record was removed or changed"
            )
        before = record.digest()


def _recorded_names(folder: Path) -> Iterator[str]:
    """Paths in the folder of whatever can be loaded; nothing in hidden folders, where downloads keep their notes."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and name not in UNRECORDED and may_be_loaded(name):
            yield name


def _differences(found: Mapping[str, str], recorded: Mapping[str, str]) -> list[str]:
    """What differs between two tables of hashes, in words."""
    problems = [f"{name} is missing" for name in recorded if name not in found]
    problems += [f"{name} stands in no record" for name in found if name not in recorded]
    both = [name for name in recorded if name in found]
    return problems + [f"{name} is not the file that was recorded" for name in both if found[name] != recorded[name]]
