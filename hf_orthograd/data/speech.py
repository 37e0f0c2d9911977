"""What scripts on speech recognisers share: decoding audio, features and labels, collators, shorter Whisper windows."""

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from datasets import Audio, Dataset, DatasetDict
from scipy.signal import resample_poly
from torch import nn
from transformers import FeatureExtractionMixin, ProcessorMixin
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from ..objectives import IGNORED_LABEL


def decode_audio(audio: Mapping[str, Any], sampling_rate: int) -> np.ndarray:
    """Decodes one entry of an audio column with soundfile: no FFmpeg, no torchcodec.

    Args:
        audio (`Mapping`): `{"bytes": ..., "path": ...}` as stored, or `{"array": ..., "sampling_rate": ...}`.
        sampling_rate (`int`): Of the result, in Hz.

    Returns:
        `numpy.ndarray` of shape (num_samples,), float32, mono. Of an array of two dimensions the shorter one is taken for the
        channels.

    Raises:
        ValueError: There is no audio, none that can be read, none of one or two dimensions, or samples that are no numbers.
    """
    if not isinstance(audio, Mapping):
        raise ValueError(f"audio must be a mapping with 'bytes', 'path' or 'array', but is {audio!r:.60}.")
    if audio.get("array") is not None:
        samples, source_rate = np.asarray(audio["array"], dtype=np.float32), audio["sampling_rate"]
    elif audio.get("bytes") is None and audio.get("path") is None:
        raise ValueError("audio has neither 'bytes' nor 'path' nor 'array'.")
    else:
        source = io.BytesIO(audio["bytes"]) if audio.get("bytes") is not None else audio["path"]
        try:
            samples, source_rate = soundfile.read(source, dtype="float32")
        except (soundfile.LibsndfileError, OSError) as error:
            raise ValueError(f"audio cannot be read: {error}") from error
    if samples.ndim == 2:
        samples = samples.mean(axis=int(np.argmin(samples.shape)))
    if samples.ndim != 1 or len(samples) == 0:
        raise ValueError(f"audio must have one or two dimensions and samples, but has shape {samples.shape}.")
    if not np.isfinite(samples).all():
        raise ValueError("audio has samples that are not finite numbers.")
    if source_rate != sampling_rate:
        divisor = np.gcd(source_rate, sampling_rate)
        samples = resample_poly(samples, sampling_rate // divisor, source_rate // divisor)
    return samples.astype(np.float32)


@lru_cache(maxsize=1)
def _english_normalizer() -> EnglishTextNormalizer:
    return EnglishTextNormalizer({})


def normalize_text(text: str) -> str:
    """Whisper's English normaliser without its table of British spellings: case, punctuation, numbers, fillers."""
    return _english_normalizer()(text)


def match_case(text: str, vocabulary: Mapping[str, int]) -> str:
    """Puts a transcript into the case a vocabulary is written in; lower where it has both."""
    has_lower = any("a" <= letter <= "z" for token in vocabulary for letter in token if not token.startswith("<"))
    return text.lower() if has_lower else text.upper()


def is_whisper_like(model: nn.Module) -> bool:
    """Whether a recogniser generates text with a decoder, as Whisper does, or labels frames, as CTC models do."""
    return bool(model.config.is_encoder_decoder)


def load_audio_folder(folder: str | Path) -> DatasetDict:
    """A corpus of audio files, laid out as the `audiofolder` of datasets: in each split's folder the files and a `metadata.csv`.

    Files are read when rows are prepared, by soundfile: neither FFmpeg nor torchcodec is needed, as `load_dataset` needs.

    Args:
        folder (`str` or `Path`): With a folder for each split, as `train`. Their `metadata.csv` has a column `file_name`, and
            others, as the transcript and the speaker, which are kept as text.

    Returns:
        `datasets.DatasetDict` whose column `audio` holds the files' paths.

    Raises:
        ValueError: No split has a `metadata.csv`, one has no `file_name` or a row of other columns, or a file is not there.
    """
    tables = sorted(Path(folder).glob("*/metadata.csv"))
    if not tables:
        raise ValueError(f"`folder` {str(folder)!r} has no folder with a metadata.csv, as train/metadata.csv.")
    splits = {}
    for table in tables:
        with table.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark before the first name
            rows = list(csv.DictReader(file))
        if not rows or "file_name" not in rows[0]:
            raise ValueError(f"{str(table)!r} has no rows with a column `file_name`.")
        for number, row in enumerate(rows, start=2):
            if None in row or None in row.values():
                raise ValueError(
                    f"{str(table)!r}, line {number}: another number of columns than the first. Quote commas in texts."
                )
            path = table.parent / row.pop("file_name")
            if not path.is_file():
                raise ValueError(
                    f"{str(table)!r} names {path.name!r}, which is no file. Remove the row, or add the file."
                )
            row["audio"] = {"bytes": None, "path": str(path)}
        splits[table.parent.name] = Dataset.from_list(rows)
    return DatasetDict(splits)


def transcript_labels(text: str, processor: ProcessorMixin, decoder_start_token_id: int | None = None) -> list[int]:
    """The labels of a transcript, as [`SpeechCollator`] makes them: `refusal_labels` for example.

    Args:
        decoder_start_token_id (`int`, *optional*): Of an encoder-decoder model, which adds it itself: it is dropped.
    """
    labels = _tokens(text, processor, processor.tokenizer.get_vocab())
    return labels[1:] if decoder_start_token_id is not None and labels[:1] == [decoder_start_token_id] else labels


def _window(extractor: FeatureExtractionMixin) -> int | None:
    """Samples of the window that Whisper reads; Parakeet reads features, too, and has none."""
    return getattr(extractor, "n_samples", None) if extractor.model_input_names[0] == "input_features" else None


def _tokens(text: str, processor: ProcessorMixin, vocabulary: dict) -> list[int]:
    # Whisper's text begins with a space; a CTC model's vocabulary has a word delimiter of its own
    prefix = " " if _window(processor.feature_extractor) is not None else ""
    return processor.tokenizer(prefix + match_case(text, vocabulary)).input_ids


def prepare_speech_dataset(
    dataset: Dataset, processor: ProcessorMixin, *, audio_column: str = "audio", text_column: str = "text"
) -> Dataset:
    """Turns audio and transcripts into model inputs and labels, keeping the other columns.

    Args:
        dataset (`datasets.Dataset`): With an audio and a text column.
        processor (`transformers.ProcessorMixin`): Of the model: its feature extractor and tokenizer.

    Returns:
        `datasets.Dataset` with the feature extractor's input column (`input_features` or `input_values`) and `labels`.

    Raises:
        ValueError: A column is missing. Or, naming the row: audio that cannot be decoded, a transcript that is none,
            or an utterance longer than Whisper's window, which would cut it but not its transcript.
    """
    for argument, column in (("audio_column", audio_column), ("text_column", text_column)):
        if column not in dataset.column_names:
            raise ValueError(
                f"`{argument}` is {column!r}, but the data set has columns {', '.join(dataset.column_names)}."
            )
    extractor, vocabulary = processor.feature_extractor, processor.tokenizer.get_vocab()
    input_name = extractor.model_input_names[0]
    window = _window(extractor)

    def prepare(row: dict, number: int) -> dict:
        text = row[text_column]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"Row {number} has no transcript in {text_column!r}: {text!r}. Remove it.")
        try:
            samples = decode_audio(row[audio_column], extractor.sampling_rate)
        except ValueError as error:
            raise ValueError(f"Row {number}, {audio_column!r}: {error} Remove or mend it.") from error
        if window is not None and len(samples) > window:
            raise ValueError(
                f"The utterance in row {number} lasts {len(samples) / extractor.sampling_rate:.1f} s, longer than the model's "
                f"window of {window / extractor.sampling_rate:.0f} s: its end would be cut off, its transcript not. Make the "
                "window longer or remove it."
            )
        features = extractor(samples, sampling_rate=extractor.sampling_rate)[input_name][0]
        return {input_name: np.asarray(features, dtype=np.float32), "labels": _tokens(text, processor, vocabulary)}

    if isinstance(dataset.features[audio_column], Audio):
        dataset = dataset.cast_column(audio_column, Audio(decode=False))
    dataset = dataset.map(prepare, with_indices=True, remove_columns=[audio_column], desc="Extracting features")
    return dataset.with_format("numpy", columns=[input_name, "labels"], output_all_columns=True)


@dataclass
class SpeechCollator:
    """Pads inputs and labels of a batch; padded labels are -100.

    Args:
        processor (`transformers.ProcessorMixin`): Of the model.
        decoder_start_token_id (`int`, *optional*): Of an encoder-decoder model, which adds it itself: it is dropped
            where the tokenizer put it first.
    """

    processor: ProcessorMixin
    decoder_start_token_id: int | None = None

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        extractor = self.processor.feature_extractor
        name = extractor.model_input_names[0]
        batch = extractor.pad([{name: example[name]} for example in examples], return_tensors="pt")
        labels = [torch.as_tensor(example["labels"]) for example in examples]
        labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL)
        if self.decoder_start_token_id is not None and (labels[:, 0] == self.decoder_start_token_id).all():
            labels = labels[:, 1:]
        return {**batch, "labels": labels}


def transcripts(processor: ProcessorMixin, is_whisper: bool) -> Callable[[Any], tuple[list[str], list[str]]]:
    """Returns a function from an `EvalPrediction` of token ids to (predicted, reference) transcripts, normalised."""
    tokenizer = processor.tokenizer

    def decode(ids: np.ndarray, **options) -> list[str]:
        ids = np.where(ids == IGNORED_LABEL, tokenizer.pad_token_id, ids)
        return [normalize_text(text) for text in tokenizer.batch_decode(ids, **options)]

    def compute(prediction) -> tuple[list[str], list[str]]:
        if is_whisper:
            options = {"skip_special_tokens": True}
            return decode(prediction.predictions, **options), decode(prediction.label_ids, **options)
        # a CTC tokenizer collapses repetitions unless a blank, which is special, stands between: in a prediction it has
        # to see the blanks, and in a reference repeated letters are real
        return decode(prediction.predictions), decode(prediction.label_ids, group_tokens=False)

    return compute


def most_likely_tokens(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """For `preprocess_logits_for_metrics` of a CTC model: token ids (B, T) in place of logits (B, T, V)."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def shorten_whisper(model: nn.Module, processor: ProcessorMixin, seconds: int) -> None:
    """Makes a Whisper model see `seconds` of audio where it would pad to 30, at that share of the encoder's cost.

    Changes `model` and `processor.feature_extractor` in place; both are saved and loaded that way.

    Raises:
        ValueError: `seconds` is not a whole number of seconds within the model's window.
    """
    positions = model.model.encoder.embed_positions
    rows_per_second = 50
    window = model.config.max_source_positions // rows_per_second
    if not 1 <= seconds <= window or seconds != int(seconds):
        raise ValueError(f"`seconds` must be a whole number from 1 to {window}, the model's window, but is {seconds}.")
    rows = int(seconds) * rows_per_second
    model.config.max_source_positions = positions.num_embeddings = rows
    model.model.encoder.max_source_positions = rows
    positions.weight = nn.Parameter(positions.weight[:rows].detach().clone(), requires_grad=False)
    settings = processor.feature_extractor.to_dict()
    settings["chunk_length"] = int(seconds)
    processor.feature_extractor = type(processor.feature_extractor).from_dict(settings)
    processor.feature_extractor.n_samples = int(seconds) * processor.feature_extractor.sampling_rate
    processor.feature_extractor.nb_max_frames = (
        processor.feature_extractor.n_samples // processor.feature_extractor.hop_length
    )
