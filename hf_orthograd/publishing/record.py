"""The record of a request: what was done, to which weights, and proof of which rows without naming one."""

import hashlib
import hmac
import json
import secrets
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from huggingface_hub import hf_hub_download, is_offline_mode
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..validation import row_digest
from .files import PUBLIC_FOLDER, RECORD_NAME, hub_name, is_weights, published_files, sha256_of
from .patience import patiently


logger = logging.get_logger(__name__)

SALT_NAME = "_unlearning_salt.key"  # Trainer pushes no file whose name begins so


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
        files (`dict[str, str]`): That of each other file that is loaded: configurations, tokenizer.
        parameters (`int`): How many numbers the model has.
        report (`str`, *optional*): SHA-256 of the public report beside it.
        committed_columns (`list[str]`, *optional*): What of a row is committed to, beside its labels; None for all.
        commitments (`list[str]`): HMAC-SHA256 of each forgotten row under the owner's salt, sorted.
        previous (`str`, *optional*): Digest of the record of the request before.
        seal (`str`, *optional*): HMAC-SHA256 of the digest under the owner's salt: only the owner can change the record.
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
    files: dict[str, str] = field(default_factory=dict)
    parameters: int = 0
    report: str | None = None
    committed_columns: list[str] | None = None
    commitments: list[str] = field(default_factory=list)
    previous: str | None = None
    seal: str | None = None

    def includes(self, row: Mapping, salt: bytes) -> bool:
        """Whether a row was in the request."""
        columns = None if self.committed_columns is None else frozenset(self.committed_columns)
        return commit(row_digest(row, columns), salt) in self.commitments

    def digest(self) -> str:
        """SHA-256 of the record but its seal, keys sorted; what the next one names as `previous`."""
        content = {name: value for name, value in asdict(self).items() if name != "seal"}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def is_sealed_by(self, salt: bytes) -> bool:
        """Whether the record is as the owner of the salt made it."""
        return self.seal is not None and hmac.compare_digest(self.seal, commit(self.digest().encode(), salt))


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


@dataclass
class Lineage:
    """Where a model came from, as far as it can be known.

    Attributes:
        base_model, base_revision, weights_before: As in [`UnlearningRecord`].
        earlier (`list[UnlearningRecord]`): Requests that it went through before, the oldest first.
    """

    base_model: str | None = None
    base_revision: str | None = None
    weights_before: dict[str, str] | None = None
    earlier: list[UnlearningRecord] = field(default_factory=list)


def find_lineage(config: PreTrainedConfig | None, token: str | None = None) -> Lineage:
    """That of a model with this configuration, which says from where it was loaded.

    Raises:
        ValueError: A record that is there cannot be read.
        OSError: The Hub did not say whether there is one.
    """
    source = getattr(config, "_name_or_path", None)
    if source and Path(source).is_dir():
        weights = weights_of(source)
        earlier = load_records(source) or load_records(Path(source, PUBLIC_FOLDER))
        if earlier and earlier[-1].weights != weights:
            logger.warning(
                f"The record in {source!r} is of other weights than those there: the new record starts a chain."
            )
            earlier = []
        newest = earlier[-1] if earlier else None
        return Lineage(getattr(newest, "base_model", None), getattr(newest, "base_revision", None), weights, earlier)
    snapshots = [] if hub_name(source) is None else _cached_snapshots(source)
    # older versions of transformers note the revision
    revision = getattr(config, "_commit_hash", None) or (snapshots[0].name if len(snapshots) == 1 else None)
    if revision is None and not snapshots:  # a name that somebody gave, or a model made here
        return Lineage()
    if revision is None:
        logger.warning(
            f"Several revisions of {source} were downloaded, and which of them the model was loaded from is not known: the record "
            "names none, and starts a chain."
        )
        return Lineage(source)
    weights = next((weights_of(one) for one in snapshots if one.name == revision), None)
    return Lineage(source, revision, weights, records_on_hub(source, revision, token))


class Origin:
    """Where a trainer's model came from, found before a save replaces it; and a name of the request.

    Args:
        model (`torch.nn.Module`): Its configuration says from where it was loaded.
        token (`str`, *optional*): For the Hub.
        is_first (`bool`): Whether this process is the one that publishes; the others look at nothing.

    Attributes:
        request_id (`str`): Drawn once: what is published twice is one request.
    """

    def __init__(self, model: nn.Module, token: str | None = None, *, is_first: bool = True):
        self._config, self._token, self._is_first = getattr(model, "config", None), token, is_first
        self._found: Lineage | None = None
        self.request_id = uuid.uuid4().hex

    def lineage(self) -> Lineage:
        """As [`find_lineage`], as it was when this was asked for first."""
        if self._found is None:
            self._found = find_lineage(self._config, self._token)
        return self._found

    def before_save(self, folder: str | Path) -> None:
        """Looks, if the model was loaded from this folder or from within it."""
        source = getattr(self._config, "_name_or_path", None)
        if (
            self._is_first
            and source
            and Path(source).is_dir()
            and Path(source).resolve().is_relative_to(Path(folder).resolve())
        ):
            self.lineage()


def _cached_snapshots(repo_id: str) -> list[Path]:
    """Folders of the revisions whose weights were downloaded."""
    folder = Path(HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"), "snapshots")
    return [one for one in folder.iterdir() if any(map(is_weights, published_files(one)))] if folder.is_dir() else []


def records_on_hub(repo_id: str, revision: str, token: str | None = None) -> list[UnlearningRecord]:
    """All requests of a model on the Hub; none if it has no record, or the Hub must not be asked."""
    try:
        path = patiently(lambda: hf_hub_download(repo_id, RECORD_NAME, revision=revision, token=token))
    except RemoteEntryNotFoundError:
        return []
    except LocalEntryNotFoundError:
        if not is_offline_mode():
            raise
        logger.warning(
            f"The Hub cannot be reached (HF_HUB_OFFLINE): whether {repo_id} went through earlier requests is not known, and the "
            "new record starts a chain."
        )
        return []
    return load_records(Path(path).parent)


def weights_of(folder: str | Path) -> dict[str, str] | None:
    """Hashes of a folder's files of weights; None if it has none."""
    return hashes_of(Path(folder), filter(is_weights, published_files(folder))) or None


def append_record(record: UnlearningRecord, earlier: list[UnlearningRecord], folder: str | Path, salt: bytes) -> None:
    """Saves a record behind those of earlier requests on the same model, chained to the last of them and sealed."""
    record.previous = earlier[-1].digest() if earlier else None
    record.seal = commit(record.digest().encode(), salt)
    save_records([*earlier, record], folder)


# ---- Commitments ----


def owner_salt(folder: str | Path) -> bytes:
    """The salt in `_unlearning_salt.key`, drawn and written there if there is none. It stays with the owner."""
    path = Path(folder, SALT_NAME)
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32) + "\n")
    return read_salt(path)


def read_salt(path: str | Path) -> bytes:
    """The salt of such a file.

    Raises:
        ValueError: It is not there, or holds no salt.
    """
    try:
        salt = bytes.fromhex(Path(path).read_text().strip())
    except (ValueError, OSError) as error:
        raise ValueError(f"{str(path)!r} holds no salt: {error}") from error
    if len(salt) < 16:
        raise ValueError(f"{str(path)!r} holds a salt of {len(salt)} bytes, too short to hide a row: 32 are usual.")
    return salt


def commit(digest: bytes, salt: bytes) -> str:
    """HMAC-SHA256 of a row's digest, or a record's. Without the salt a guess cannot be checked."""
    return hmac.new(salt, digest, hashlib.sha256).hexdigest()


def commit_all(row_digests: Iterable[bytes], salt: bytes) -> list[str]:
    """Those of all rows, sorted: their order says nothing about row numbers."""
    return sorted(commit(digest, salt) for digest in row_digests)


def hashes_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files, by their names in the folder."""
    return {name: sha256_of(folder / name) for name in sorted(names)}
