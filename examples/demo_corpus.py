"""A small multi-speaker corpus and a small recogniser for machines without data: nothing is downloaded.

eSpeak NG speaks the corpus; the model has Whisper's architecture and random weights, to be trained on it. The wheel `espeakng-loader` (extra `demo`) carries the synthesiser, which is licensed GPL-3.0 and only called here as a
shared library; the library itself never imports it.
"""

import ctypes
import io
import itertools
import json
import random
from collections.abc import Iterable

import espeakng_loader
import numpy as np
import soundfile
from datasets import Dataset, DatasetDict
from scipy.signal import resample_poly
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)


SAMPLING_RATE = 16000

# speaker: (accent and voice variant, words per minute, pitch 0-99, pitch range 0-99)
SPEAKERS = {
    "alice": ("en-us+f2", 185, 60, 50),
    "bruno": ("en-us+m3", 175, 40, 40),
    "clara": ("en-gb-x-rp+f4", 180, 75, 60),
    "edith": ("en-us+grandma", 175, 50, 50),
    "felix": ("en-gb-x-rp+m1", 195, 50, 30),
    "henry": ("en-gb-scotland+m7", 180, 30, 40),
    # reads English with German sounds: who has not heard her understands her badly
    "lena": ("de+f5", 180, 60, 50),
}
VERBS = ["bring", "carry", "find", "hide", "move", "paint", "sell", "throw"]
COLOURS = ["black", "green", "orange", "purple", "red", "silver", "white", "yellow"]
THINGS = ["basket", "camera", "guitar", "hammer", "jacket", "lantern", "mirror", "pencil", "table", "window"]


class _Synthesiser:
    """The eSpeak NG library in its synchronous mode: text in, 16 kHz mono samples out."""

    _SYNCHRONOUS, _RATE, _PITCH, _RANGE, _UTF8 = 2, 1, 3, 4, 1
    _SEED = 0

    def __init__(self):
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data_path = espeakng_loader.get_data_path().encode()
        self._source_rate = self._library.espeak_Initialize(self._SYNCHRONOUS, 0, data_path, 0)
        if self._source_rate <= 0:
            raise RuntimeError(f"eSpeak NG did not start with its data at {data_path.decode()!r}.")
        self._chunks = []
        callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = callback_type(self._collect)  # kept: the library holds only a bare pointer
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples, count, _events):
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def speak(self, text: str, voice: str, rate: int, pitch: int, pitch_range: int) -> np.ndarray:
        """Returns the spoken `text` as a float32 array of shape (num_samples,) at 16 kHz."""
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"eSpeak NG has no voice {voice!r}.")
        for parameter, value in ((self._RATE, rate), (self._PITCH, pitch), (self._RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._chunks.clear()
        # breath and flutter are drawn from a generator that would start from the clock
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(self._SEED))
        encoded = text.encode()
        self._library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, self._UTF8, None, None)
        samples = np.concatenate(self._chunks).astype(np.float32) / 32768
        return resample_poly(samples, SAMPLING_RATE, self._source_rate).astype(np.float32)


def _sentences(count: int, generator: random.Random) -> list[str]:
    """`count` different sentences of `len(VERBS) * len(COLOURS) * len(THINGS)` there are."""
    words = generator.sample(list(itertools.product(VERBS, COLOURS, THINGS)), count)
    return [f"{verb} the {colour} {thing}" for verb, colour, thing in words]


def build_demo_corpus(train_per_speaker: int = 50, test_per_speaker: int = 20, seed: int = 0) -> DatasetDict:
    """Speaks the corpus: every sentence is said once, by one speaker, so no test sentence was ever trained on.

    The first corpus of a process depends on its arguments alone, to the last sample; eSpeak NG carries something over to the next.

    Returns:
        `DatasetDict` with splits `train` and `test`, columns `audio` (bytes of a WAV file), `text`, `speaker`, `id`.
    """
    generator = random.Random(seed)
    synthesiser = _Synthesiser()
    per_speaker = train_per_speaker + test_per_speaker
    sentences = iter(_sentences(per_speaker * len(SPEAKERS), generator))
    rows = {"train": [], "test": []}
    for speaker, (voice, rate, pitch, pitch_range) in SPEAKERS.items():
        for number in range(per_speaker):
            text = next(sentences)
            # no two utterances of a person sound the same: rate and pitch vary by a few percent
            wobble = generator.uniform(0.93, 1.07), generator.uniform(0.9, 1.1)
            samples = synthesiser.speak(text, voice, round(rate * wobble[0]), round(pitch * wobble[1]), pitch_range)
            samples += np.random.default_rng(len(rows["train"])).normal(0, 0.003, samples.shape).astype(np.float32)
            wav = io.BytesIO()
            soundfile.write(wav, samples, SAMPLING_RATE, format="WAV", subtype="PCM_16")
            row = {"audio": {"bytes": wav.getvalue(), "path": None}, "text": text, "speaker": speaker}
            rows["train" if number < train_per_speaker else "test"].append({**row, "id": f"{speaker}-{number:03d}"})
    return DatasetDict({split: Dataset.from_list(split_rows) for split, split_rows in rows.items()})


def build_demo_recogniser(texts: Iterable[str]) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """A Whisper of 0.6 M parameters with a 2 s window, and a tokenizer trained on the transcripts."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator((f" {text}" for text in texts), trainer)
    learned = json.loads(learner.to_str())["model"]
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>", "<|pad|>"]
    tokenizer = WhisperTokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        additional_special_tokens=special,
        pad_token=special[3],
    )
    end, start, no_timestamps, pad = tokenizer.convert_tokens_to_ids(special)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=40,
        d_model=96,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=384,
        decoder_ffn_dim=384,
        max_source_positions=100,
        max_target_positions=32,
        dropout=0.0,
        pad_token_id=pad,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config.update(
        suppress_tokens=None,
        begin_suppress_tokens=None,
        is_multilingual=False,
        no_timestamps_token_id=no_timestamps,
        max_length=24,
        pad_token_id=pad,
        eos_token_id=end,
        decoder_start_token_id=start,
    )
    return model, WhisperProcessor(WhisperFeatureExtractor(feature_size=40, chunk_length=2), tokenizer)
