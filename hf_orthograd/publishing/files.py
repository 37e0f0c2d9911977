"""What may be published: a list of names. Whatever else lies in a folder stays where it is."""

import hashlib
import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

from transformers.utils import logging


logger = logging.get_logger(__name__)

PUBLIC_FOLDER = "public"  # within `output_dir`
RECORD_NAME = "unlearning_record.json"
CARD_NAME = "README.md"
SIGNATURE_NAME = "model.sig"
FIGURES = ("cost.png", "relearning.png")
REPORT_FILES = ("unlearning_report.json", "unlearning_report.md")

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
ADAPTER_WEIGHTS = ("adapter_model.safetensors",)
PUBLISHED = (
    *WEIGHTS,
    *ADAPTER_WEIGHTS,
    "model.safetensors.index.json",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab.json",
    "*vocab.txt",
    "merges.txt",
    "normalizer.json",
    "*.model",  # SentencePiece
    "*.spm",
    "bpe.codes",
    "chat_template.jinja",
    CARD_NAME,
    *REPORT_FILES,
    *FIGURES,
    RECORD_NAME,
    SIGNATURE_NAME,
)
# in a repository's history anything that may hold weights counts, whoever wrote it
_MODEL_FORMATS = (
    "safetensors bin pt pth ckpt h5 hdf5 keras msgpack gguf ggml onnx onnx_data distcp nemo tflite".split()
)
_ARCHIVES = "pkl pickle joblib npz npy zip tar gz tgz 7z".split()
# what large file storage holds beside them; all else in it counts
_HARMLESS = "png jpg jpeg gif webp svg pdf wav flac mp3 ogg mp4 json jsonl txt md csv parquet arrow model spm".split()
# made anew by the `card` command, or later than the record: their content is not part of it
UNRECORDED = (CARD_NAME, RECORD_NAME, SIGNATURE_NAME, REPORT_FILES[1], *FIGURES)


def is_weights(name: str) -> bool:
    """Whether a published file of this name holds weights."""
    return any(fnmatch(name, pattern) for pattern in (*WEIGHTS, *ADAPTER_WEIGHTS))


def may_hold_weights(path: str, is_large: bool = False) -> bool:
    """Whether a file of a repository may hold a model.

    Args:
        is_large (`bool`): Whether it lies in large file storage, where weights of any name would lie.
    """
    ending = _ending(path)
    return ending in (*_MODEL_FORMATS, *_ARCHIVES) or (is_large and ending not in _HARMLESS)


def is_of_a_model(path: str) -> bool:
    """Whether a file on a branch belongs to a model that another one replaces: weights of any folder, and at the root what is
    published beside them."""
    return _ending(path) in _MODEL_FORMATS or is_published(path)


def may_be_loaded(path: str) -> bool:
    """Whether a file can change what `from_pretrained` loads: weights, configurations, tokenizers, code."""
    return is_published(path) or may_hold_weights(path) or path.endswith((".json", ".py"))


def _ending(path: str) -> str:
    """Tells what a file holds; that of Trainer's own arguments, a pickle named as weights, tells nothing of a model."""
    name = path.rsplit("/", 1)[-1].lower()
    return "json" if name == "training_args.bin" else name.rsplit(".", 1)[-1]


def is_published(path: str) -> bool:
    """Whether a file is on the list, which is of names at the root."""
    return "/" not in path and any(fnmatch(path, pattern) for pattern in PUBLISHED)


def published_files(folder: str | Path) -> list[str]:
    """The names in a folder that may be published, none of a folder in it."""
    return sorted(path.name for path in Path(folder).iterdir() if path.is_file() and is_published(path.name))


def remove_others(folder: str | Path) -> None:
    """Removes what may not be published from a folder that is to be; says so, but of Trainer's arguments."""
    kept = set(published_files(folder))
    others = [path for path in Path(folder).iterdir() if path.name not in kept]
    for path in others:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if named := sorted(path.name for path in others if path.name != "training_args.bin"):
        logger.warning(f"Not published, as it is not known what they hold: {', '.join(named)}.")


def hub_name(name: str | None) -> str | None:
    """A name if it can be one on the Hub and is no folder here."""
    if not name or Path(name).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return None
    return name


def remove_paths(folder: str | Path, base_model: str | None) -> None:
    """Configurations say from which folder a model, a part of it or a tokenizer was loaded: only a name on the Hub may stay."""
    for path in Path(folder).glob("*.json"):
        if path.name in REPORT_FILES or path.name == RECORD_NAME or path.name.endswith(".index.json"):
            continue
        content = json.loads(path.read_text())
        if _replace_paths(content, base_model):
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _replace_paths(content, base_model: str | None) -> bool:
    """Replaces them wherever they stand, and says whether there were any."""
    changed = False
    if isinstance(content, dict):
        for key in ("_name_or_path", "name_or_path", "base_model_name_or_path"):
            if isinstance(content.get(key), str) and content[key] != hub_name(content[key]):
                content[key], changed = base_model or "", bool(content[key]) or changed
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return any([changed, *(_replace_paths(value, base_model) for value in inner)])


def sha256_of(path: str | Path) -> str:
    return _hash(path, hashlib.sha256())


def git_blob_of(path: str | Path) -> str:
    """Under which name git knows the content of a file that is not in large file storage."""
    return _hash(path, hashlib.sha1(b"blob %d\0" % Path(path).stat().st_size))


def _hash(path: str | Path, digest) -> str:
    """Block by block: files of weights are larger than memory."""
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
