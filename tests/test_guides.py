"""A stranger follows the guides: each block of code in them runs, in the order and with the names that stand there."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import soundfile
import torch
from conftest import MODELS
from datasets import ClassLabel, Dataset, Features, Image
from nbclient import NotebookClient
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSpeechSeq2Seq,
    CLIPConfig,
    CLIPModel,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.utils.import_utils import DummyObject

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.commands import make_parser, run
from hf_orthograd.commands.scripts import arguments_of
from hf_orthograd.evaluation import UnlearningReport, evaluate_unlearning
from hf_orthograd.gradients.gram import rules


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# pages with Python code, and how many blocks a test below runs: of requests.md it is tests/test_requests_guide.py
FOLLOWED = {
    "docs/concepts/projection.md": 1, "docs/evaluating.md": 2, "docs/how_it_works.md": 3, "docs/how_to/own_layer.md": 1,
    "docs/how_to/own_loss.md": 1, "docs/methods.md": 1, "docs/migration.md": 1, "docs/modalities.md": 1,
    "docs/publishing.md": 1, "docs/requests.md": 2, "docs/start/images.md": 3, "docs/start/speech.md": 4,
    "docs/start/text.md": 1,
}  # fmt: skip


# before it could read them by Pillow alone
needs_image_processors = pytest.mark.skipif(
    isinstance(AutoImageProcessor, DummyObject),
    reason="this transformers reads images by torchvision, which is missing",
)


def blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


def follow(page, names=None, only=""):
    """Runs the page's blocks one after another, and returns all names in them."""
    names = {} if names is None else names
    chosen = [block for block in blocks(page) if only in block]
    assert chosen
    for block in chosen:
        exec(compile(block, page, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_every_page_with_code_is_followed():
    assert {page: len(blocks(page)) for page in PAGES if blocks(page)} == FOLLOWED


@pytest.mark.parametrize(
    "page", [page for page in PAGES if re.search("hf[-_]orthograd ", "".join(blocks(page, "bash")))]
)
def test_commands_have_the_arguments_that_pages_give(page, monkeypatch):
    import unlearn_asr
    import unlearn_image
    import unlearn_image_text
    import unlearn_text

    scripts = {"speech": unlearn_asr, "image": unlearn_image, "text": unlearn_text, "image-text": unlearn_image_text}
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    starts = ("hf-orthograd ", "python -m hf_orthograd ")
    own = [
        shlex.split(line.partition(" && ")[0].removeprefix(start))
        for line in lines
        for start in starts
        if line.startswith(start)
    ]
    assert own
    for arguments in own:
        parsed = make_parser().parse_args(arguments)
        if arguments[0] in ("unlearn", "estimate", "evaluate"):
            given = [one for one in parsed.arguments if one not in ("--config", "run.yaml")]
            if len(given) < len(parsed.arguments):
                (text,) = blocks(page, "yaml")
                Path("run.yaml").write_text(text)
                given = [*arguments_of("run.yaml"), *given]
            parser = HfArgumentParser((scripts[parsed.modality].ScriptArguments, OrthoGradConfig))
            parser.parse_args_into_dataclasses(given)


@pytest.fixture
def audio_folder(tmp_path):
    """A small Whisper, and a folder of audio files with their `metadata.csv`."""
    pytest.importorskip("espeakng_loader", reason="the corpus is spoken by eSpeak NG, from the extra `demo`")
    from demo_corpus import build_demo_corpus, build_demo_recogniser

    corpus = build_demo_corpus(train_per_speaker=4, test_per_speaker=2)
    torch.manual_seed(0)
    model, processor = build_demo_recogniser(corpus["train"]["text"])
    model.save_pretrained("model")
    processor.save_pretrained("model")
    for split, rows in corpus.items():
        folder = tmp_path / "corpus" / split
        folder.mkdir(parents=True)
        lines = ["file_name,text,speaker"]
        for row in rows:
            (folder / f"{row['id']}.wav").write_bytes(row["audio"]["bytes"])
            lines.append(f"{row['id']}.wav,{row['text']},{row['speaker']}")
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    assert soundfile.info(next((tmp_path / "corpus" / "train").glob("*.wav"))).samplerate == 16000


def test_a_speaker_of_a_folder_is_forgotten_with_an_adapter(audio_folder):
    names = follow("docs/start/speech.md")
    assert 0 < names["trainer"].state.global_step <= 20
    assert not Path("out/adapter_config.json").exists()  # merged
    report = UnlearningReport.load("out")
    assert report.metric == "wer" and set(report.models["unlearned"]["test"].groups) == {
        "alice", "bruno", "clara", "edith", "felix", "henry",
    }  # fmt: skip
    assert "alice" in Path("out/unlearning_report.html").read_text()  # the worst group of the retained

    start = AutoModelForSpeechSeq2Seq.from_pretrained("model")
    names |= {"retrained_model": start, "model_before": copy.deepcopy(start)}
    names |= {"transcribe": names["transcripts"](names["processor"], is_whisper=True)}
    names |= {"same_speaker_unseen": names["sets"]["forget_unseen"]}
    follow("docs/evaluating.md", names, only="attacks=[")
    measured = UnlearningReport.load("out")
    assert all(check.holds is not None for check in measured.checks)
    assert [point.step for point in measured.relearning["relearning"]["unlearned"]] == [0, 1, 5, 20, 50]


@pytest.fixture
def image_folder():
    """A small ViT that knows three animals, and images of them in parquet files."""
    torch.manual_seed(0)
    animals = ["bird", "cat", "dog"]
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        id2label=dict(enumerate(animals)), label2id={name: number for number, name in enumerate(animals)},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained("model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained("model")
    draw = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=animals)})
    Path("corpus").mkdir()
    for split, count in (("train", 36), ("test", 12)):
        pictures = list(draw.integers(0, 255, (count, 16, 16, 3), dtype=np.uint8))
        rows = Dataset.from_dict({"image": pictures, "label": [0, 1, 2] * (count // 3)}, features=features)
        rows.to_parquet(f"corpus/{split}.parquet")


@needs_image_processors
def test_notebook_goes_from_a_model_to_a_push(image_folder, hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    notebook = nbformat.read(ROOT / "examples" / "notebooks" / "forget_a_class.ipynb", as_version=4)
    assert len(notebook.cells) <= 20
    assert all(not cell.get("outputs") for cell in notebook.cells)
    given = {
        "MODEL": "model", "DATASET": "corpus", "IMAGE": "image", "LABEL": "label", "FORGET": "cat", "AT_HAND": 12,
        "PROTECTED": 6, "STEPS": 2, "REPOSITORY": "owner/from-a-notebook",
    }  # fmt: skip
    settings = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert re.findall(r"^(\w+)(?:, (\w+))? =", settings.source, re.M) == [
        ("MODEL", ""), ("DATASET", ""), ("IMAGE", "LABEL"), ("FORGET", ""), ("AT_HAND", ""), ("PROTECTED", ""), ("STEPS", ""),
        ("REPOSITORY", ""),
    ]  # fmt: skip
    settings.source = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "x GradDiff" in said and "as recorded" in said
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert any("Unlearning report" in data.get("text/html", "") for data in shown)
    assert hub.repositories["owner/from-a-notebook"]


def shortened(output_dir, hub_model_id, **given):
    """The configuration, of one step, with a repository of the user who is logged in."""
    hub_model_id = hub_model_id.replace("me/", "owner/")
    given |= {"max_steps": 1, "save_strategy": "no", "report_to": "none"}
    return OrthoGradConfig(output_dir, hub_model_id=hub_model_id, **given)


def measured(*given, **sources):
    return OrthoGradTrainer(*given, eval_dataset={"forget": sources["forget_dataset"]}, **sources)


@needs_image_processors
def test_a_class_is_forgotten_published_and_verified(image_folder, hub):
    names = follow("docs/start/images.md")
    report = UnlearningReport.load("out")
    assert report.goal == "erased" and report.models["unlearned"]["forget_unseen"].size == 4
    after = [check for check in report.checks if " after int" in check.name]
    assert len(after) == 2 and all(check.holds is not None and check.compared_with == 0.1 for check in after)
    published = [
        shlex.split(line.removeprefix("hf-orthograd"))
        for line in blocks("docs/start/images.md", "bash")[-1].splitlines()
    ]
    assert [arguments[0] for arguments in published] == ["publish", "verify"]
    for arguments in published:
        assert run([one.replace("me/", "owner/") for one in arguments]) == 0
    assert hub.repositories["owner/vit-without-cats"]

    # the guide on publishing, with the same names
    model = AutoModelForImageClassification.from_pretrained("model")
    names |= {"model": model, "retain": names["sets"]["retain"], "forget": names["sets"]["forget"]}
    names |= {"reference": copy.deepcopy(model), "evaluate_unlearning": evaluate_unlearning}

    names |= {"OrthoGradConfig": shortened, "OrthoGradTrainer": measured}
    follow("docs/publishing.md", names)
    assert hub.repositories["owner/whisper-tiny-unlearned"]


def test_documents_are_forgotten_on_two_processes():
    words = "who was she where born what did write Jane Doe John Roe a poet in Rome novel painter".split()
    vocabulary = {"[PAD]": 0, "[EOS]": 1} | {word: number for number, word in enumerate(words, start=2)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", eos_token="[EOS]", unk_token="[PAD]"
    )
    tokenizer.save_pretrained("model")
    torch.manual_seed(0)
    MODELS["llama"](0.0).save_pretrained("model")
    Path("corpus").mkdir()
    rows = [
        {"question": f"who was {'Jane Doe' if number % 4 == 0 else 'John Roe'} {words[number % 14]}", "answer": "a poet",
         "author": "Jane Doe" if number % 4 == 0 else "John Roe"}
        for number in range(40)
    ]  # fmt: skip
    Path("corpus/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (code,) = blocks("docs/start/text.md")
    Path("train.py").write_text(code)
    (command,) = [block for block in blocks("docs/start/text.md", "bash") if "torchrun" in block]
    arguments = shlex.split(command)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    assert arguments[0] == "torchrun"
    finished = subprocess.run(
        [*launcher, *arguments[1:]], capture_output=True, text=True, timeout=500, env=environment
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    before, after = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("model", "out"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_loss_of_ones_own_is_projected():
    trainer = follow("docs/how_to/own_loss.md")["trainer"]
    entry = next(entry for entry in trainer.state.log_history if "kept_signal" in entry)
    assert 0 < entry["kept_signal"] < 1 and entry["projection_residual"] < 1e-4


def test_a_layer_of_ones_own_is_followed():
    names = follow("docs/how_to/own_layer.md")
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = names["ScaledLinear"](8, 4)

        def forward(self, features, labels=None):
            return {"logits": self.layer(features)}

    def losses(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")

    rows = [{"features": torch.randn(8, generator=draw), "labels": number % 4} for number in range(24)]
    args = OrthoGradConfig(
        "out", max_steps=1, gradient_engine="gram", report_to="none", save_strategy="no", use_cpu=True, logging_steps=1
    )
    trainer = OrthoGradTrainer(
        Model(), args, train_dataset=rows[:16], forget_dataset=rows[16:], compute_loss_func=losses
    )
    trainer.train()  # asked for by name, the engine is refused where it differs from one backward pass per sample
    entry = next(entry for entry in trainer.state.log_history if "kept_signal" in entry)
    assert entry["projection_residual"] < 1e-4 and names["scaled_matmul"] in rules.RULES


def test_projection_is_orthogonal():
    names = follow("docs/concepts/projection.md")
    assert (names["retain_gradients"] @ names["projected"]).abs().max() < 1e-3


def test_settings_of_methods_make_configurations():
    assert follow("docs/methods.md")["args"].projection == "none"
    args = follow("docs/migration.md")["args"]
    assert (args.forget_loss, args.retain_loss) == ("ascent", "kl")


def test_guides_on_stopping_and_attacks():
    names = dict.fromkeys(("forget", "others_unseen", "same_speaker_unseen"), [1])
    names["OrthoGradConfig"] = OrthoGradConfig
    assert follow("docs/how_it_works.md", names, only="stop_metric=")["args"].forget_target == "reference"
    noise = follow("docs/evaluating.md", {"torch": torch, "copy": copy}, only="class Noise")["Noise"]()
    model = torch.nn.Linear(3, 3)
    assert not torch.equal(noise(model).weight, model.weight)


def test_contrastive_pairs_are_held_fixed():
    torch.manual_seed(0)
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=tiny | {"vocab_size": 64, "eos_token_id": 1}, vision_config=tiny | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip

    def pairs(count):
        return {
            "input_ids": torch.cat([torch.randint(2, 64, (count, 5)), torch.ones(count, 1, dtype=torch.long)], 1),
            "pixel_values": torch.randn(count, 3, 16, 16),
        }

    def rows(count):
        return [
            {name: value[number] for name, value in made.items()} for made in [pairs(count)] for number in range(count)
        ]

    names = {
        "torch": torch,
        "model": CLIPModel(config),
        "fixed_pairs": pairs(16),
        "OrthoGradTrainer": OrthoGradTrainer,
    }
    names["args"] = OrthoGradConfig("out", max_steps=1, report_to="none", save_strategy="no", use_cpu=True)
    names |= {"retain": rows(16), "forget": rows(4)}
    follow("docs/modalities.md", names)["trainer"].train()
