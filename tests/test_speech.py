import io
import json

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from transformers import (
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from hf_orthograd.data.speech import (
    SpeechCollator,
    decode_audio,
    load_audio_folder,
    match_case,
    most_likely_tokens,
    normalize_text,
    prepare_speech_dataset,
    shorten_whisper,
    transcripts,
)


def tone(rate, seconds=1.0, channels=1):
    samples = np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate).astype(np.float32)
    return samples if channels == 1 else np.stack([samples] * channels, axis=1)


def encoded(samples, rate, kind="WAV"):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind)
    return buffer.getvalue()


@pytest.mark.parametrize(("rate", "channels", "kind"), [(16000, 1, "WAV"), (8000, 2, "FLAC"), (44100, 1, "OGG")])
def test_audio_is_decoded_to_mono_at_the_rate_asked_for(rate, channels, kind, tmp_path):
    data = encoded(tone(rate, channels=channels), rate, kind)
    (tmp_path / "tone").write_bytes(data)
    for audio in ({"bytes": data, "path": None}, {"bytes": None, "path": str(tmp_path / "tone")}):
        samples = decode_audio(audio, 16000)
        assert samples.dtype == np.float32
        assert abs(len(samples) - 16000) <= 1
        spectrum = np.abs(np.fft.rfft(samples))
        assert abs(int(spectrum.argmax()) - 440) <= 1
    array = decode_audio({"array": tone(8000), "sampling_rate": 8000}, 16000)
    assert len(array) == 16000


def test_text():
    assert normalize_text("Mr. Quilter, it IS!") == normalize_text("mister quilter it is")
    assert match_case("Hello", {"a": 0, "B": 1}) == "hello"
    assert match_case("Hello", {"<pad>": 0, "A": 1}) == "HELLO"


class Processor:
    def __init__(self, extractor):
        self.feature_extractor = extractor


@pytest.fixture
def ctc_processor(tmp_path):
    letters = ["<pad>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]
    (tmp_path / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), bos_token=None, eos_token=None)
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer)


@pytest.fixture
def corpus():
    said = ((0.5, "hello all"), (0.7, "yes"))
    audio = [{"bytes": encoded(tone(16000, seconds), 16000), "path": None} for seconds, _ in said]
    return Dataset.from_dict({"audio": audio, "text": [text for _, text in said]})


def test_ctc_pipeline_from_audio_to_transcripts(ctc_processor, corpus):
    prepared = prepare_speech_dataset(corpus, ctc_processor)
    batch = SpeechCollator(ctc_processor)([prepared[0], prepared[1]])
    assert batch["input_values"].shape == (2, 11200)
    assert batch["attention_mask"].sum(dim=1).tolist() == [8000, 11200]
    assert (batch["labels"][1, 3:] == -100).all()

    class Prediction:
        # a perfect recogniser: each label in its own frame, blanks between
        label_ids = batch["labels"].numpy()
        predictions = np.full((2, 18), 0)

    Prediction.predictions[:, ::2] = np.where(Prediction.label_ids < 0, 0, Prediction.label_ids)
    predictions, references = transcripts(ctc_processor, is_whisper=False)(Prediction)
    assert references == predictions == ["hello all", "yes"]


def test_a_ctc_model_may_read_features(ctc_processor, corpus, parakeet_extractor):
    """Parakeet has features, frames first, and no window that an utterance could be too long for."""
    processor = Processor(parakeet_extractor)
    processor.tokenizer = ctc_processor.tokenizer
    prepared = prepare_speech_dataset(corpus, processor)
    frames = [np.asarray(row["input_features"]).shape for row in prepared]
    assert [shape[1] for shape in frames] == [80, 80] and frames[0][0] < frames[1][0]
    assert [len(row["labels"]) for row in prepared] == [len("hello all"), len("yes")]


def test_utterance_longer_than_the_window_is_not_cut_silently(corpus):
    processor = Processor(WhisperFeatureExtractor(chunk_length=1))
    processor.tokenizer = Wav2Vec2CTCTokenizer.__new__(Wav2Vec2CTCTokenizer)
    processor.tokenizer.get_vocab = lambda: {"a": 0}
    processor.feature_extractor.n_samples = 8000
    with pytest.raises(ValueError, match="lasts 0.7 s, longer than the model's window of"):
        prepare_speech_dataset(corpus.select([1]), processor)


def test_most_likely_tokens():
    logits = torch.zeros(1, 2, 3)
    logits[0, 0, 2] = logits[0, 1, 1] = 1
    assert most_likely_tokens(logits, None).tolist() == most_likely_tokens((logits,), None).tolist() == [[2, 1]]


def test_shorter_window_hears_the_same(make_model, tmp_path):
    """A model of 2 s cut to 1 s gives what the whole model's first second of position embeddings give."""
    model = make_model("whisper")
    config = model.config
    config.max_source_positions, config.num_mel_bins = 100, 80
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    processor = Processor(WhisperFeatureExtractor(chunk_length=2))
    kept = model.model.encoder.embed_positions.weight[:50].clone()
    shorten_whisper(model, processor, 1)
    features = processor.feature_extractor(tone(16000, 0.8), sampling_rate=16000, return_tensors="pt").input_features
    assert features.shape == (1, 80, 100)
    assert torch.equal(model.model.encoder.embed_positions.weight, kept)
    ids = torch.tensor([[1, 4]])
    with torch.no_grad():
        expected = model(input_features=features, decoder_input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_features=features, decoder_input_ids=ids).logits, expected)


@pytest.mark.parametrize("seconds", [0, 3, 1.5])
def test_window_out_of_range(seconds, make_model):
    model = make_model("whisper")
    model.config.max_source_positions = 100
    with pytest.raises(ValueError, match=f"from 1 to 2, the model's window, but is {seconds}"):
        shorten_whisper(model, Processor(WhisperFeatureExtractor()), seconds)


def test_folder_of_audio_files_needs_its_tables(tmp_path):
    with pytest.raises(ValueError, match="has no folder with a metadata.csv"):
        load_audio_folder(tmp_path)
    (tmp_path / "train").mkdir()
    table = tmp_path / "train" / "metadata.csv"
    table.write_text("text\nhello\n")
    with pytest.raises(ValueError, match="has no rows with a column `file_name`"):
        load_audio_folder(tmp_path)
    table.write_text('file_name,text,speaker\na.wav,"well, hello",ann\n')
    with pytest.raises(ValueError, match="names 'a.wav', which is no file"):
        load_audio_folder(tmp_path)
    table.write_text("file_name,text,speaker\na.wav,well, hello,ann\n")
    with pytest.raises(ValueError, match="line 2: another number of columns"):
        load_audio_folder(tmp_path)
    table.write_text('\ufefffile_name,text,speaker\na.wav,"well, hello",ann\n')
    soundfile.write(tmp_path / "train" / "a.wav", np.full(160, 0.5), 16000)
    row = load_audio_folder(tmp_path)["train"][0]
    assert (row["text"], row["speaker"]) == ("well, hello", "ann")
    assert np.allclose(decode_audio(row["audio"], 16000), 0.5, atol=1e-3)
