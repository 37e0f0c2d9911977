"""What may be published: a list of names. Whatever else lies in a folder stays where it is."""

import hashlib
import json
import re
from fnmatch import fnmatch
from pathlib import Path


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
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "normalizer.json",
    "*.model",  # SentencePiece
    "chat_template.jinja",
    CARD_NAME,
    *REPORT_FILES,
    *FIGURES,
    RECORD_NAME,
    SIGNATURE_NAME,
)
# in a repository's history anything that may hold weights counts, whoever wrote it
ANY_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.pkl")


def is_weights(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in (*WEIGHTS, *ADAPTER_WEIGHTS))


def may_hold_weights(path: str) -> bool:
    """Whether a file of a repository may hold a model; Trainer's own arguments, a pickle too, do not."""
    name = path.rsplit("/", 1)[-1]
    return any(fnmatch(name, pattern) for pattern in ANY_WEIGHTS) and name != "training_args.bin"


def published_files(folder: str | Path) -> list[str]:
    """The names in a folder that may be published, none of a folder in it."""
    return sorted(
        path.name
        for path in Path(folder).iterdir()
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in PUBLISHED)
    )


def remove_others(folder: str | Path) -> None:
    """Removes the files of a folder that may not be published, as Trainer's arguments, which hold paths."""
    kept = set(published_files(folder))
    for path in Path(folder).iterdir():
        if path.is_file() and path.name not in kept:
            path.unlink()


def hub_name(name: str | None) -> str | None:
    """A model's name if it is one of the Hub's and no folder here."""
    if not name or Path(name).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return None
    return name


def remove_paths(folder: str | Path, base_model: str | None) -> None:
    """Configurations say from which folder a model or tokenizer was loaded: only a name on the Hub may stay."""
    for path in Path(folder).glob("*.json"):
        if path.name in REPORT_FILES or path.name == RECORD_NAME or path.name.endswith(".index.json"):
            continue
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            continue
        changed = False
        for key in ("_name_or_path", "name_or_path", "base_model_name_or_path"):
            if key in content and content[key] != hub_name(content[key]):
                content[key], changed = base_model or "", True
        if changed:
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sha256_of(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def git_blob_of(path: str | Path) -> str:
    """Under which name git knows the content of a file that is not in large file storage."""
    content = Path(path).read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
