"""The record of a request: what was done, to which weights, and proof of which rows without naming one."""

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..validation import row_digest
from .files import RECORD_NAME, sha256_of


SALT_NAME = "unlearning_salt.key"


@dataclass
class UnlearningRecord:
    """One request, as it may be read by anyone.

    Attributes:
        request_id (`str`): The owner's name for the request; random by default. No name of a person belongs here.
        date (`str`): When the record was made, ISO 8601, UTC.
        goal (`str`, *optional*): "retrained" or "erased", if a report says so.
        method (`dict`): The trainer's class and the settings of [`OrthoGradConfig`] that are not Trainer's.
        training (`dict`): Optimizer, learning rate, steps, batch sizes, precision, seed, number of processes.
        sizes (`dict[str, int]`): How many samples were forgotten, and how many of the retained were at hand.
        versions (`dict[str, str]`): Of the packages.
        base_model, base_revision (`str`, *optional*): On the Hub, if the model came from there.
        weights_before (`dict[str, str]`, *optional*): SHA-256 of each file that the model was loaded from, where known.
        weights (`dict[str, str]`): SHA-256 of each file of weights now.
        report (`str`, *optional*): SHA-256 of the public report beside it.
        committed_columns (`list[str]`, *optional*): What of a row is committed to, beside its labels; None for all.
        commitments (`list[str]`): HMAC-SHA256 of each forgotten row under the owner's salt, sorted.
        previous (`str`, *optional*): Digest of the record of the request before.
    """

    request_id: str
    date: str
    goal: str | None
    method: dict
    training: dict
    sizes: dict[str, int]
    versions: dict[str, str]
    base_model: str | None = None
    base_revision: str | None = None
    weights_before: dict[str, str] | None = None
    weights: dict[str, str] = field(default_factory=dict)
    report: str | None = None
    committed_columns: list[str] | None = None
    commitments: list[str] = field(default_factory=list)
    previous: str | None = None

    def names(self, row: Mapping, salt: bytes) -> bool:
        """Whether a row was in the request."""
        columns = None if self.committed_columns is None else frozenset(self.committed_columns)
        return commit(row_digest(row, columns), salt) in self.commitments

    def digest(self) -> str:
        """SHA-256 of the record, its keys sorted; what the next one names as `previous`."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_records(folder: str | Path) -> list[UnlearningRecord]:
    """All requests of a folder, the oldest first; none if it has no record.

    Raises:
        ValueError: The file is there, but is no record.
    """
    path = Path(folder, RECORD_NAME)
    if not path.exists():
        return []
    try:
        return [UnlearningRecord(**record) for record in json.loads(path.read_text())["records"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is no record of unlearning: {error}") from error


def save_records(records: list[UnlearningRecord], folder: str | Path) -> None:
    text = json.dumps({"records": [asdict(record) for record in records]}, indent=1)
    Path(folder, RECORD_NAME).write_text(text + "\n")


def append_record(record: UnlearningRecord, earlier: list[UnlearningRecord], folder: str | Path) -> None:
    """Saves a record behind those of earlier requests on the same model, and chained to the last of them."""
    record.previous = earlier[-1].digest() if earlier else None
    save_records([*earlier, record], folder)


# ---- Commitments ----


def owner_salt(folder: str | Path) -> bytes:
    """The salt in `unlearning_salt.key`, drawn and written there if there is none. It stays with the owner."""
    path = Path(folder, SALT_NAME)
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32) + "\n")
    return read_salt(path)


def read_salt(path: str | Path) -> bytes:
    """The salt of such a file.

    Raises:
        ValueError: It holds no salt.
    """
    text = Path(path).read_text().strip()
    try:
        salt = bytes.fromhex(text)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} holds no salt: {error}") from error
    if len(salt) < 16:
        raise ValueError(f"{str(path)!r} holds a salt of {len(salt)} bytes, too short to hide a row: 32 are usual.")
    return salt


def commit(row_digest: bytes, salt: bytes) -> str:
    """HMAC-SHA256 of one row. Without the salt a guessed row cannot be checked."""
    return hmac.new(salt, row_digest, hashlib.sha256).hexdigest()


def commit_all(row_digests: Iterable[bytes], salt: bytes) -> list[str]:
    """Those of all rows, sorted: their order says nothing about row numbers."""
    return sorted(commit(digest, salt) for digest in row_digests)


def hashes_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in sorted(names)}


def same(found: Mapping[str, str], recorded: Mapping[str, str]) -> list[str]:
    """What differs between two tables of hashes, in words."""
    problems = [f"{name} is missing" for name in recorded if name not in found]
    problems += [f"{name} stands in no record" for name in found if name not in recorded]
    both = [name for name in recorded if name in found]
    return problems + [f"{name} is not the file that was recorded" for name in both if found[name] != recorded[name]]
