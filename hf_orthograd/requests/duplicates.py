"""New data before a model is trained on it: does it hold rows that it was asked to forget, as they were or nearly?

Exact rows are found by the record's commitments, which need the owner's salt and no forgotten data. What is nearly the same
is found by sketches, which the owner keeps in place of the data: hashes of word sequences under the salt for text, a coarse
spectrogram for audio. A sketch is no secret to who holds both it and the salt: it stays where the salt is.
"""

import hashlib
import re
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from ..annotations import AnyDataset
from ..data.speech import decode_audio
from ..publishing import UnlearningRecord, commit
from ..validation import LABEL_NAMES, label_column, row_digests


WORDS = 3  # in a row: few enough that a changed word leaves most of a sentence, enough that other sentences share few
TEXT_SIMILARITY, AUDIO_SIMILARITY = 0.3, 0.7
_SIGNS = "\u3040-\u30ff\u3400-\u9fff"  # kana, Chinese characters
_WORD = re.compile(rf"[{_SIGNS}]|[^\W_{_SIGNS}]+")
# of an audio sketch: mel bands up to a frequency that telephones keep, in steps that are means of ten frames
_BANDS, _HIGHEST, _RATE = 16, 3800.0, 16_000  # the last two in Hz
_FRAME, _HOP, _MEAN_OF = 0.025, 0.010, 10  # seconds, seconds, frames
_QUIET = 30.0  # dB
_LEAST_OVERLAP = 0.7  # of the shorter of two recordings
_LEAST_STEPS = 30  # of overlap, 3 s: shorter pieces of speech are alike by chance


@dataclass(frozen=True)
class FoundRow:
    """A row that was asked to be forgotten.

    Attributes:
        row (`int`): Its number in the set that was checked.
        request_id (`str`): Of the request.
        similarity (`float`): 1 for an exact row; of a near duplicate as [`Sketches.find`] has it.
        exact (`bool`): Whether it is the same row, and no near duplicate, whose similarity may be 1, too.
    """

    row: int
    request_id: str
    similarity: float
    exact: bool


def check_dataset(
    dataset: AnyDataset, records: UnlearningRecord | Sequence[UnlearningRecord], salt: bytes
) -> list[FoundRow]:
    """Rows of a data set that a record commits to.

    A row counts as the same if what the model reads of it and its labels are, whatever its other columns: the set has to be
    prepared as the forget set was.

    Args:
        dataset (`Dataset`): New data.
        records ([`UnlearningRecord`] or a sequence of them): As `load_records(folder)` gives them.
        salt (`bytes`): The owner's, of these records; from `read_salt(path)`.

    Raises:
        ValueError: No record carries the seal of this salt; or the set lacks columns that the record commits to.
    """
    records = [records] if isinstance(records, UnlearningRecord) else list(records)
    sealed = [record for record in records if record.is_sealed_by(salt)]
    if not sealed:
        raise ValueError("`salt` is not that of these records: none carries its seal. Pass the salt of the request.")
    return committed_rows(dataset, sealed, salt, {})


# of one data set the digests of its rows, by what of them was hashed: a large one takes long
RowDigests = dict[tuple[str, ...] | frozenset[str] | None, list[bytes]]


def committed_rows(
    dataset: AnyDataset, sealed: Sequence[UnlearningRecord], salt: bytes, digests: RowDigests
) -> list[FoundRow]:
    """As [`check_dataset`], of records with the seal of this salt; `digests` are filled, to be used again with the same data set."""
    found = []
    for record in sealed:
        columns = None if record.committed_columns is None else tuple(record.committed_columns)
        missing = set(columns or ()) - set(dataset.column_names)
        if missing:
            raise ValueError(
                f"`dataset` has no column {', '.join(sorted(missing))}, by which request {record.request_id!r} knows its rows: "
                "prepare it as the forget set was."
            )
        if columns not in digests:
            chosen = None if columns is None else frozenset(columns)
            digests[columns] = row_digests(dataset, chosen)
        known = set(record.commitments)
        found += [
            FoundRow(row, record.request_id, 1.0, True)
            for row, one in enumerate(digests[columns])
            if commit(one, salt) in known
        ]
    return sorted(found, key=lambda one: one.row)


def same_rows(dataset: Dataset, rows: Dataset, request_id: str, digests: RowDigests) -> list[FoundRow]:
    """Rows of a data set that are equal to some of `rows` in the columns that both have, labels by any name among them.

    `digests` are filled, as [`committed_rows`] does.

    Raises:
        ValueError: They share no column but labels.
    """
    dataset, rows = _with_labels(dataset), _with_labels(rows)
    shared = [name for name in rows.column_names if name in dataset.column_names]
    columns = frozenset(shared) - {*LABEL_NAMES, "attention_mask"}
    if not columns:
        raise ValueError(
            f"`dataset` has none of the columns {', '.join(rows.column_names)} of request {request_id!r}, only "
            f"{', '.join(dataset.column_names)}: prepare it as the forget set was."
        )
    shared = [name for name in shared if name in {*columns, "labels", "attention_mask"}]
    known = set(row_digests(rows.select_columns(shared), columns))
    hashed = frozenset(shared)
    if hashed not in digests:
        digests[hashed] = row_digests(dataset.select_columns(shared), columns)
    return [FoundRow(row, request_id, 1.0, True) for row, one in enumerate(digests[hashed]) if one in known]


def _with_labels(dataset: Dataset) -> Dataset:
    name = label_column(dataset.column_names)
    return dataset if name in (None, "labels") else dataset.rename_column(name, "labels")


class Sketches:
    """What tells near duplicates of some rows, without the rows.

    Args:
        kind (`str`): Of all rows: "text", "tokens" or "audio"; an attribute, too.
        rows (`list[np.ndarray]`): Of each row of text or tokens the hashes of its word sequences, sorted, uint64; of audio its coarse
            spectrogram, shape (steps, bands).
    """

    def __init__(self, kind: str, rows: list[np.ndarray]):
        self.kind, self._rows = kind, rows

    @classmethod
    def of(cls, rows: Iterable, salt: bytes) -> "Sketches":
        """Of a column.

        Args:
            rows (`Iterable`): Strings for text, lists of whole numbers for tokens; for audio dicts of an `Audio(decode=False)` column,
                or with "array" and "sampling_rate".
            salt (`bytes`): The owner's.

        Raises:
            ValueError: A row is none of these, or another kind than those before it.
        """
        sketches: list[np.ndarray] = []
        kind = "text"
        for number, row in enumerate(rows):
            own = kind_of(row, number)
            if sketches and own != kind:
                raise ValueError(
                    f"Row {number} is {own}, and those before it are {kind}: make a sketch of each column."
                )
            kind = own
            sketches.append(_coarse_spectrogram(decode_audio(row, _RATE)) if kind == "audio" else _hashes(row, salt))
        return cls(kind, sketches)

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, rows: Iterable, salt: bytes, similarity: float | None = None) -> list[tuple[int, float]]:
        """Numbers of rows that are nearly one of the sketched, with the highest similarity.

        Of text and tokens, Broder's containment (1997): the share of the sketched row's sequences of three words that stand in the new row, so that a longer text which
        contains it counts. Of audio: the correlation of both spectrograms in steps of 0.1 s, each band's mean removed, at the shift
        where it is highest, over 3 s at least. Other words for the same, or the same words read again, are no near duplicates.

        Args:
            rows (`Iterable`): As [`of`] takes them.
            salt (`bytes`): That of the sketches.
            similarity (`float`, *optional*): From which on a row counts: 0.3 of text and tokens, 0.7 of audio by default.

        Raises:
            ValueError: Rows of another kind than those that were sketched: nothing would be found.
        """
        new = Sketches.of(rows, salt)
        if len(new) == 0 or len(self) == 0:
            return []
        if self.kind != new.kind:
            raise ValueError(
                f"`rows` are {new.kind}, but the sketches are of {self.kind}: pass the column that was sketched."
            )
        scores = self._audio_scores(new) if self.kind == "audio" else self._text_scores(new)
        usual = AUDIO_SIMILARITY if self.kind == "audio" else TEXT_SIMILARITY
        least = usual if similarity is None else similarity
        return [(int(row), float(scores[row])) for row in np.flatnonzero(scores >= least)]

    def _text_scores(self, new: "Sketches") -> np.ndarray:
        holders = defaultdict(list)
        for number, hashes in enumerate(self._rows):
            for one in hashes.tolist():
                holders[one].append(number)
        scores = np.zeros(len(new))
        for row, hashes in enumerate(new._rows):
            shared = Counter(number for one in hashes.tolist() for number in holders.get(one, ()))
            scores[row] = max((count / len(self._rows[number]) for number, count in shared.items()), default=0.0)
        return scores

    def _audio_scores(self, new: "Sketches") -> np.ndarray:
        return np.array([_best_correlations(self._rows, one) for one in new._rows])

    def save(self, path: str | Path) -> None:
        """Writes an `.npz` file, for the owner."""
        lengths = np.array([len(one) for one in self._rows], dtype=np.int64)
        joined = np.concatenate(self._rows) if self._rows else np.zeros(0)
        np.savez_compressed(path, kind=np.array(self.kind), lengths=lengths, rows=joined)

    @classmethod
    def load(cls, path: str | Path) -> "Sketches":
        """Reads what [`save`] wrote.

        Raises:
            ValueError: The file holds no sketches.
        """
        try:
            with np.load(path) as content:
                lengths = content["lengths"]
                rows = np.split(content["rows"], np.cumsum(lengths)[:-1]) if len(lengths) else []
                return cls(str(content["kind"]), rows)
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{str(path)!r} holds no sketches: {error}") from error


def kind_of(row: Any, number: int) -> str:
    """ "text", "tokens" or "audio".

    Raises:
        ValueError: The row, of this number, is none of these.
    """
    if isinstance(row, Mapping):
        return "audio"
    if isinstance(row, str):
        return "text"
    if np.ndim(row) == 1 and (len(row) == 0 or np.issubdtype(np.asarray(row).dtype, np.integer)):
        return "tokens"
    raise ValueError(f"Row {number} is a {type(row).__name__}, neither text, tokens nor audio of an `Audio` column.")


def _hashes(row: str | Sequence, salt: bytes) -> np.ndarray:
    """Of each sequence of words, or tokens; of a row of fewer words that of all, of one without any none."""
    words = _words(row) if isinstance(row, str) else [str(int(token)) for token in row]
    if not words:
        return np.zeros(0, dtype=np.uint64)
    count = max(1, len(words) - WORDS + 1)
    sequences = {" ".join(words[start : start + WORDS]) for start in range(count)}
    keyed = (hashlib.blake2b(one.encode(), digest_size=8, key=salt[:64]).digest() for one in sequences)
    return np.sort(np.frombuffer(b"".join(keyed), dtype=np.uint64))


def _words(text: str) -> list[str]:
    """Capitals, marks and ways to write a letter make no difference; where words are not set apart, signs are words."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _coarse_spectrogram(samples: np.ndarray) -> np.ndarray:
    """Log mel energies in steps of 0.1 s, each band's mean removed, shape (steps, bands), float32.

    What is 30 dB below the loudest counts as silence: noise fills it differently in each copy.
    """
    length = round(_FRAME * _RATE)
    size = 1 << (length - 1).bit_length()
    filters = mel_filter_bank(1 + size // 2, _BANDS, 0.0, _HIGHEST, _RATE)
    samples = np.pad(samples.astype(np.float64), (0, max(0, length * _MEAN_OF - len(samples))))
    energies = spectrogram(
        samples, window_function(length), length, round(_HOP * _RATE), size, mel_filters=filters, power=2.0
    ).T
    steps = len(energies) // _MEAN_OF
    energies = energies[: steps * _MEAN_OF].reshape(steps, _MEAN_OF, -1).mean(axis=1)
    levels = 10 * np.log10(np.maximum(energies, 1e-12))
    levels = np.maximum(levels, levels.max() - _QUIET)
    return (levels - levels.mean(axis=0)).astype(np.float32)


def _best_correlations(spectrograms: list[np.ndarray], new: np.ndarray) -> float:
    """The highest correlation of a new spectrogram with any of the others, at any shift with enough overlap."""
    longest = max(map(len, spectrograms))
    size = 1 << (longest + len(new) - 1).bit_length()
    padded = np.zeros((len(spectrograms), longest, new.shape[1]), dtype=np.float32)
    for own, row in zip(padded, spectrograms, strict=True):
        own[: len(row)] = row
    lengths = np.array([len(row) for row in spectrograms])

    def correlate(own: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Sum over bands and time at every shift, shape (rows, shifts); shift s has `own` s steps later."""
        product = np.fft.rfft(own, size, axis=1) * np.conj(np.fft.rfft(other, size, axis=0))
        return np.roll(np.fft.irfft(product.sum(axis=2), size), len(new) - 1, axis=1)[:, : longest + len(new) - 1]

    present = (np.arange(longest) < lengths[:, None]).astype(np.float32)[..., None]
    ones = np.ones((len(new), 1), dtype=np.float32)
    overlap = np.rint(correlate(present, ones))
    own_energy = correlate((padded**2).sum(axis=2, keepdims=True), ones)
    new_energy = correlate(present, (new**2).sum(axis=1, keepdims=True))
    enough = overlap >= np.maximum(_LEAST_OVERLAP * np.minimum(lengths, len(new)), _LEAST_STEPS)[:, None]
    scale = np.sqrt(np.maximum(own_energy * new_energy, 1e-6))
    return float(np.where(enough, correlate(padded, new) / scale, -1.0).max())
