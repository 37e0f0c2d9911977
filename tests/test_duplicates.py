"""New data is searched for rows that were asked to be forgotten: as they were, and nearly."""

import random
from pathlib import Path

import numpy as np
import pytest
from datasets import Audio, Dataset, concatenate_datasets, load_dataset
from published import rows
from scipy.signal import resample_poly

from hf_orthograd import publishing
from hf_orthograd.data.speech import decode_audio
from hf_orthograd.requests import FoundRow, RequestHistory, Sketches, check_dataset


SPEECH = Path(__file__).parent.parent.parent / "shared" / "data" / "speech" / "mini-librispeech" / "data"
SALT = b"s" * 32
WORDS = [f"{first}{second}" for first in "ka lo mi nu pe ra si to".split() for second in "ba den fil gor hum".split()]


def sentences(count, seed, length=24):
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(length)) for _ in range(count)]


def changed(text, share, seed):
    """With so many of its words replaced."""
    draw, words = random.Random(seed), text.split()
    for place in draw.sample(range(len(words)), round(share * len(words))):
        words[place] = draw.choice(WORDS)
    return " ".join(words)


def test_all_planted_rows_are_found_among_ten_thousand(unlearned, make_samples):
    trainer = unlearned(push_to_hub=False)
    trainer.create_model_card()
    folder = trainer.args.output_dir
    records = publishing.load_records(f"{folder}/public")
    salt = publishing.read_salt(f"{folder}/{publishing.SALT_NAME}")
    columns = records[0].committed_columns
    forget = trainer.forget_dataset.with_format("numpy")
    generator = np.random.default_rng(0)
    pixels = generator.normal(size=(10_000, *forget[0]["pixel_values"].shape)).astype(np.float32)
    labels = generator.integers(0, 4, size=10_000)
    planted = {17: 0, 5_000: 3, 5_001: 1, 9_999: 2}
    for row, source in planted.items():
        pixels[row], labels[row] = forget[source]["pixel_values"], forget[source]["labels"]
    new = Dataset.from_dict({"pixel_values": list(pixels), "labels": labels, "from": ["May"] * 10_000})
    found = check_dataset(new, records, salt)
    assert columns == ["pixel_values"]
    assert found == [FoundRow(row, records[0].request_id, 1.0, True) for row in planted]
    with pytest.raises(ValueError, match="`salt` is not that of these records"):
        check_dataset(new, records, SALT)
    with pytest.raises(ValueError, match="`dataset` has no column pixel_values, by which request"):
        check_dataset(new.remove_columns("pixel_values"), records, salt)


def test_nearly_the_same_text_is_found():
    forgotten, others = sentences(40, seed=1), sentences(2_000, seed=2)
    sketches = Sketches.of(forgotten, SALT)
    near = [changed(text, 0.15, seed) for seed in range(5) for text in forgotten]
    within = [f"{others[n]} {text.upper()}! {others[-n]}" for n, text in enumerate(forgotten)]
    assert len(sketches.find(near, SALT)) >= 0.95 * len(near)
    assert len(sketches.find(within, SALT)) == len(within)  # a longer text that holds it, capitals and marks aside
    assert len(sketches.find(others, SALT)) <= 0.01 * len(others)
    assert sketches.find(forgotten, SALT) == [(row, 1.0) for row in range(40)]
    assert sketches.find(forgotten, b"t" * 32) == []  # under another salt nothing is known
    tokens = [[WORDS.index(word) for word in text.split()] for text in forgotten]
    assert Sketches.of(tokens, SALT).find(tokens[3:4], SALT) == [(0, 1.0)]


def test_sketches_hold_no_text_and_come_back_from_a_file(tmp_path):
    forgotten = ["one two three four", "two"]
    Sketches.of(forgotten, SALT).save(tmp_path / "sketches.npz")
    assert b"two" not in (tmp_path / "sketches.npz").read_bytes()
    again = Sketches.load(tmp_path / "sketches.npz")
    assert len(again) == 2
    assert again.find(["zero one two three", "Two."], SALT) == [(0, 0.5), (1, 1.0)]
    (tmp_path / "broken.npz").write_bytes(b"none")
    with pytest.raises(ValueError, match="holds no sketches"):
        Sketches.load(tmp_path / "broken.npz")


def test_what_cannot_be_sketched_is_named():
    sound = {"array": np.zeros(16_000), "sampling_rate": 16_000}
    with pytest.raises(ValueError, match="Row 1 is a float, neither text, tokens nor audio"):
        Sketches.of(["a", 0.5], SALT)
    with pytest.raises(ValueError, match="Row 0 is a list, neither text"):
        Sketches.of([[0.25, 0.5]], SALT)
    assert Sketches.of(["", "..."], SALT).find(["", "a", "!"], SALT) == []
    assert Sketches.of(["\u4eca\u65e5\u306f\u826f\u3044\u5929\u6c17"], SALT).find(
        ["\u4eca\u65e5\u306f\u826f\u3044\u5929\u6c14"], SALT
    )
    assert Sketches.of(["Jos\u00e9 came home"], SALT).find(["Jose\u0301 came home"], SALT) == [(0, 1.0)]
    with pytest.raises(ValueError, match="Row 1 is audio, and those before it are text: make a sketch of each column"):
        Sketches.of(["a", sound], SALT)
    with pytest.raises(ValueError, match="`rows` are audio, but the sketches are of text"):
        Sketches.of(["a"], SALT).find([sound], SALT)
    with pytest.raises(ValueError, match="`rows` are tokens, but the sketches are of text"):
        Sketches.of(["a"], SALT).find([[1, 2]], SALT)


def copies(array, rate, generator):
    """Of one recording, as others would pass it on."""
    noise = generator.normal(size=len(array)) * np.sqrt(np.mean(array**2) / 100)
    return {
        "noise at 20 dB": (array + noise, rate),
        "a fifth as loud": (0.2 * array, rate),
        "at 8 kHz": (resample_poly(array, 1, 2), rate // 2),
        "without its beginning": (array[len(array) // 10 :], rate),
        "without its end": (array[: -len(array) // 20], rate),
    }


@pytest.mark.skipif(not SPEECH.exists(), reason="needs recordings of speech")
def test_nearly_the_same_recording_is_found():
    speech = load_dataset("parquet", data_files=str(SPEECH / "test-*.parquet"), split="train")
    speech = speech.cast_column("audio", Audio(decode=False)).select(range(110))["audio"]
    speech = [one for one in speech if len(decode_audio(one, 16_000)) > 5 * 16_000]  # shorter ones are not looked for
    forgotten, others = speech[:10], speech[10:]
    sketches, generator = Sketches.of(forgotten, SALT), np.random.default_rng(0)
    found = {}
    for one in forgotten:
        for name, (array, rate) in copies(decode_audio(one, 16_000), 16_000, generator).items():
            found.setdefault(name, []).extend(sketches.find([{"array": array, "sampling_rate": rate}], SALT))
    assert all(len(own) >= 0.95 * len(forgotten) for own in found.values()), {n: len(own) for n, own in found.items()}
    assert len(sketches.find(others, SALT)) <= 0.01 * len(others)


def test_a_history_finds_rows_of_all_its_requests(tmp_path, make_model, make_samples):
    make_model("vit").save_pretrained(tmp_path / "original")
    history = RequestHistory.create(tmp_path / "history", tmp_path / "original")
    texts = sentences(4, seed=1)
    history.add(rows(make_samples("vit", 4)), request_id="case-1", sketch=texts)
    new = rows(make_samples("vit", 6, seed=5))
    column = [*sentences(5, seed=3), changed(texts[2], 0.1, 0)]
    (found,) = history.check_dataset(new, column=column)  # a pending request counts
    assert (found.row, found.request_id) == (5, "case-1") and 0.3 < found.similarity < 1
    assert history.check_dataset(new) == []
    # the same row, and another one with the same text: as similar, and not the same
    both = concatenate_datasets([new.select([0]), rows(make_samples("vit", 4)).select([1])])
    found = history.check_dataset(both, column=[texts[1], texts[1]])
    assert found == [FoundRow(1, "case-1", 1.0, True), FoundRow(0, "case-1", 1.0, False)]
