"""The example as a user runs it, shortened: one epoch, a few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Audio, Dataset, load_dataset
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from hf_orthograd.data.speech import decode_audio
from hf_orthograd.evaluation import UnlearningReport
from hf_orthograd.publishing import verify


EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("espeakng_loader", reason="the demo corpus is spoken by eSpeak NG, from the extra `demo`")
import unlearn_asr  # noqa: E402
from demo_corpus import SPEAKERS, build_demo_corpus  # noqa: E402


# a model that has hardly learned speaks until it is cut off: few utterances are enough, and a number that fills the
# batches of two processes, of which Trainer's own evaluation would count some twice
SHORTENED = ("--finetune_epochs", "0.2", "--max_steps", "2", "--max_eval_samples", "6")
SHORTENED += ("--per_device_eval_batch_size", "3")


@pytest.fixture
def run_here(monkeypatch):
    """Runs the example in this process: a fresh one takes ten seconds to import what it needs."""

    def run(*arguments):
        quiet = ("--report_to", "none", "--disable_tqdm", "1", "--use_cpu", "1")
        monkeypatch.setattr(sys, "argv", ["unlearn_asr.py", *arguments, *quiet])
        unlearn_asr.main()

    return run


def run_example(*arguments, launcher=(), environment=None):
    command = [sys.executable, *launcher, str(EXAMPLES / "unlearn_asr.py"), *arguments]
    command += ["--report_to", "none", "--disable_tqdm", "1"]
    environment = os.environ | (environment or {})
    finished = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def check_outputs(output, methods):
    results = json.loads((output / "results.json").read_text())
    assert list(results["rows"]) == methods
    for row in results["rows"].values():
        for name in ("forget", "forget_unseen", "retain", "test"):
            assert row[name]["wer"] >= 0 and row[name]["cer"] >= 0
    assert (output / "results.md").read_text().count("\n") == 2 + len(methods)
    assert (output / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert results["peak_memory_gib"] > 0
    report = UnlearningReport.load(output)
    forgotten, row = report.models["unlearned"]["forget"], results["rows"][methods[-1]]["forget"]
    assert forgotten.value == pytest.approx(row["wer"] / 100)
    assert forgotten.further["cer"].value == pytest.approx(row["cer"] / 100)
    assert report.models["unlearned"]["retain"].worst_group is not None
    return results


def seconds(row):
    return len(decode_audio(row["audio"], 16000)) / 16000


SPOKEN = """
import hashlib, demo_corpus
corpus = demo_corpus.build_demo_corpus(train_per_speaker=3, test_per_speaker=2)
print(hashlib.sha256(repr(list(corpus["train"]) + list(corpus["test"])).encode()).hexdigest())
"""


def test_corpus_is_the_same_in_every_process():
    """To the last sample, breath and flutter of the voices too."""
    command = [sys.executable, "-c", SPOKEN]
    running = [subprocess.Popen(command, cwd=EXAMPLES, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=300)[0].strip() for process in running)
    assert first == second and len(first) == 64


def test_corpus_shares_no_sentence():
    corpus = build_demo_corpus(train_per_speaker=3, test_per_speaker=2)
    assert all(0.8 < seconds(row) < 2 for row in corpus["train"])
    sentences = list(corpus["train"]["text"]) + list(corpus["test"]["text"])
    assert len(set(sentences)) == len(sentences) == 5 * len(SPEAKERS)
    assert set(corpus["train"]["speaker"]) == set(SPEAKERS)


def test_demo_in_two_processes_from_corpus_to_one_push(tmp_path, hub):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d")
    launcher += ("--rdzv-endpoint", "localhost:0")
    rule = ("--retain_budget", "5", "--stop_metric", "wer", "--eval_strategy", "steps", "--eval_steps", "2")
    push = ("--push_to_hub", "--hub_model_id", "owner/forgetful", "--output_dir", str(tmp_path))
    online = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_write"}
    printed = run_example(*SHORTENED, *rule, "--use_cpu", "1", *push, launcher=launcher, environment=online)
    results = check_outputs(tmp_path, ["before", "retrained", 'projection="none"', 'projection="orthogonal"'])
    assert (tmp_path / "checkpoint-0").is_dir()
    assert "| before |" in printed and results["arguments"]["forget_values"] == ["lena"]
    history = results["rows"]['projection="orthogonal"']["history"]
    assert [entry["step"] for entry in history] == [1, 2]
    assert 0 < history[0]["kept_signal"] < 1 and history[0]["projection_rank"] > 30  # of both processes
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    audio = torch.zeros(16000).numpy()
    features = processor.feature_extractor(audio, sampling_rate=16000, return_tensors="pt").input_features
    assert model.generate(features).shape[0] == 1
    assert sum("/commit/" in request for request in hub.requests) == 1
    assert verify("owner/forgetful") == []
    assert "wer, with its 95 % interval" in ModelCard.load("owner/forgetful").text
    assert not any(b"lena" in received for received in hub.received)


def test_dry_run_prints_the_estimate_and_makes_nothing(run_here, tmp_path, capsys, monkeypatch):
    made, show = [], unlearn_asr.show_one_bar
    monkeypatch.setattr(unlearn_asr, "show_one_bar", lambda trainer: made.append(trainer) or show(trainer))
    run_here("--dry_run", "--output_dir", str(tmp_path / "out"), "--use_lora", "--refusal", "no")
    (trainer,) = made
    row = {"audio": build_demo_corpus(1, 1)["train"][0]["audio"], "text": "no"}
    prepared = unlearn_asr.prepare_speech_dataset(Dataset.from_list([row]), trainer.processing_class)
    assert trainer.args.forget_loss == "refusal"
    assert trainer.args.refusal_labels == trainer.data_collator([prepared[0]])["labels"][0].tolist()
    printed = capsys.readouterr().out
    assert "engine 'gram'" in printed
    assert "8 forget and 30 retain samples" in printed
    assert "x GradDiff" in printed
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize("use_lora", [False, True])
def test_a_frozen_decoder_leaves_the_encoder_to_be_trained(make_model, use_lora):
    arguments = unlearn_asr.ScriptArguments(freeze_decoder=True, use_lora=use_lora, lora_rank=2)
    model = make_model("whisper")
    trained = {n for n, p in unlearn_asr.make_student(model, arguments).named_parameters() if p.requires_grad}
    assert trained and all(".encoder." in name for name in trained)
    everything = {name for name, p in model.get_encoder().named_parameters() if p.requires_grad}
    assert use_lora or {name.partition(".encoder.")[2] for name in trained} == everything
    assert all(p.requires_grad for p in model.get_decoder().parameters())  # the original's


@pytest.mark.parametrize("use_lora", [False, True])
def test_the_lower_encoder_alone_is_trained(make_model, use_lora):
    arguments = unlearn_asr.ScriptArguments(trained_encoder_layers=1, use_lora=use_lora, lora_rank=2)
    model = make_model("whisper")
    trained = {n for n, p in unlearn_asr.make_student(model, arguments).named_parameters() if p.requires_grad}
    assert trained and all(".encoder.layers.0." in name or ".encoder.conv" in name for name in trained)
    assert use_lora or any(".encoder.conv1." in name for name in trained)
    assert len(model.get_encoder().layers) == 2 and all(p.requires_grad for p in model.get_decoder().parameters())


@pytest.fixture
def ctc_folder(tmp_path):
    """A small Wav2Vec2 with its processor, and a corpus folder as one would download it."""
    letters = ["<pad>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(vocabulary), bos_token=None, eos_token=None)
    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer)
    from conftest import MODELS

    torch.manual_seed(0)
    config = MODELS["wav2vec2"]().config
    config.vocab_size, config.pad_token_id, config.ctc_zero_infinity = len(letters), 0, True
    config.conv_kernel, config.conv_stride = [20, 16], [20, 16]  # 50 frames a second, as real ones have
    Wav2Vec2ForCTC(config).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    corpus = build_demo_corpus(train_per_speaker=3, test_per_speaker=2)
    for split, rows in corpus.items():
        (tmp_path / "corpus").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "corpus" / f"{split}-00000-of-00001.parquet")
    return tmp_path


def test_ctc_model_from_a_folder_with_lora(run_here, ctc_folder, monkeypatch):
    inputs = ("--model_name_or_path", str(ctc_folder / "model"), "--dataset_name", str(ctc_folder / "corpus"))
    output = ctc_folder / "out"
    with pytest.raises(ValueError, match=r"\['zoe'\] do not occur in column 'speaker', which has 'alice', 'bruno'"):
        run_here(*inputs, "--forget_values", "zoe")
    with pytest.raises(
        ValueError, match="`--freeze_decoder` is set, but Wav2Vec2ForCTC has no decoder. Leave it out."
    ):
        run_here(*inputs, "--forget_values", "alice", "--freeze_decoder")
    with pytest.raises(ValueError, match="is 1, but Wav2Vec2ForCTC has an encoder of 0 layers below a decoder"):
        run_here(*inputs, "--forget_values", "alice", "--trained_encoder_layers", "1")
    varied, vary = [], unlearn_asr.VarySpeech.vary
    monkeypatch.setattr(unlearn_asr.VarySpeech, "vary", lambda self, heard: varied.append(heard) or vary(self, heard))
    run_here(
        *inputs, "--forget_values", "alice", "bruno", "--retain_size", "10", "--per_device_train_batch_size", "4",
        "--max_steps", "2", "--retain_loss", "kl", "--retrain", "--finetune_epochs", "0.1", "--use_lora", "--learning_rate", "1e-3", "--logging_steps", "1", "--output_dir", str(output),
    )  # fmt: skip
    results = check_outputs(output, ["before", "retrained", 'projection="orthogonal"'])
    assert len(varied) >= 2 * 4
    report = UnlearningReport.load(output)  # the run was to end at the level of the retrained model
    assert results["arguments"]["forget_target"] == pytest.approx(report.models["reference"]["forget"].loss, rel=1e-4)
    # merged: it loads without peft
    assert not (output / "adapter_config.json").exists()
    loaded, start = Wav2Vec2ForCTC.from_pretrained(output), Wav2Vec2ForCTC.from_pretrained(ctc_folder / "model")
    changed = [name for name, p in loaded.named_parameters() if not torch.equal(p, start.get_parameter(name))]
    assert changed and all("_proj.weight" in name for name in changed)

    # the saved model, measured by itself; of one of the two no test row is there
    rows = load_dataset(str(ctc_folder / "corpus"))
    (ctc_folder / "less").mkdir()
    for split, part in rows.cast_column("audio", Audio(decode=False)).items():
        kept = part if split == "train" else part.filter(lambda row: row["speaker"] != "alice")
        kept.to_parquet(ctc_folder / "less" / f"{split}-00000-of-00001.parquet")
    run_here(
        "--model_name_or_path", str(output), "--dataset_name", str(ctc_folder / "less"), "--forget_values", "alice", "bruno",
        "--retain_size", "10", "--evaluate_only", "--original_name_or_path", str(ctc_folder / "model"),
        "--refusal", "no", "--output_dir", str(ctc_folder / "measured"),
    )  # fmt: skip
    measured = UnlearningReport.load(ctc_folder / "measured")
    assert set(measured.models) == {"unlearned", "original", "unlearned, int8", "unlearned, int4"}
    assert set(measured.models["unlearned"]["forget_unseen"].groups) == {"bruno"}
    assert not {"alice", "bruno"} & set(measured.models["unlearned"]["test"].groups)
    again = measured.models["unlearned"]["forget"]
    assert again.further.pop("refusals").value == 0.0 and again == report.models["unlearned"]["forget"]
    assert not (ctc_folder / "measured" / "model.safetensors").exists()
