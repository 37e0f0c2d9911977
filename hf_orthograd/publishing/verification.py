"""Whether a published model is what its record says."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download

from ..evaluation import UnlearningReport
from .files import REPORT_FILES, is_weights, published_files, sha256_of
from .record import hashes_of, load_records, same


def verify(
    folder_or_repo_id: str | Path,
    *,
    salt: bytes | None = None,
    row: Mapping | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> list[str]:
    """Checks weights, report and the chain of records, and whether a row was in one of the requests.

    Args:
        folder_or_repo_id (`str` or `Path`): A folder, or a model on the Hub, which is downloaded.
        salt (`bytes`, *optional*): The owner's, from [`read_salt`].
        row (`Mapping`, *optional*): Of the forget set, with the columns it had; needs the salt.

    Returns:
        `list[str]`: What differs, each in words. Empty if all is as recorded.

    Raises:
        ValueError: One of `salt` and `row` is missing.
    """
    if (salt is None) != (row is None):
        raise ValueError("Whether a row was in the request is checked by `salt` and `row` together: pass both.")
    folder = Path(folder_or_repo_id)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(folder_or_repo_id), revision=revision, token=token))
    problems = verify_folder(folder)
    if salt is not None and row is not None:
        if not any(record.names(row, salt) for record in load_records(folder)):
            problems.append("the row is in no request of this record, under this salt")
    return problems


def verify_folder(folder: Path) -> list[str]:
    """What differs between a folder and its record."""
    records = load_records(folder)
    if not records:
        return ["there is no unlearning_record.json"]
    problems = []
    before: str | None = None
    for number, record in enumerate(records, start=1):
        if record.previous != before:
            problems.append(
                f"the chain is broken before request {record.request_id!r}, number {number}: a record was removed or changed"
            )
        before = record.digest()
    newest = records[-1]
    found = hashes_of(folder, filter(is_weights, published_files(folder)))
    problems += same(found, newest.weights)
    report = folder / REPORT_FILES[0]
    if newest.report is None and report.exists():
        problems.append(f"{report.name} stands in no record")
    elif newest.report is not None and not report.exists():
        problems.append(f"{report.name} is missing")
    elif newest.report is not None:
        if sha256_of(report) != newest.report:
            problems.append(f"{report.name} is not the report that was recorded")
        text = folder / REPORT_FILES[1]
        if text.exists() and text.read_text() != UnlearningReport.load(folder).to_markdown() + "\n":
            problems.append(f"{text.name} does not say what {report.name} says")
    return problems
