"""Finds an example, turns a YAML file into its arguments, and starts it, by itself or through Accelerate."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml


# modality: the example that unlearns it
SCRIPTS = {
    "speech": "unlearn_asr.py",
    "image": "unlearn_image.py",
    "text": "unlearn_text.py",
    "image-text": "unlearn_image_text.py",
}
_PACKAGE = Path(__file__).parent.parent
# where setup.py installs the examples, and where they lie in a checkout
_FOLDERS = (_PACKAGE / "scripts", _PACKAGE.parent / "examples")


def script_path(modality: str) -> Path:
    """The file of the example.

    Raises:
        FileNotFoundError: It was not installed with the package.
    """
    found = [folder / SCRIPTS[modality] for folder in _FOLDERS if (folder / SCRIPTS[modality]).exists()]
    if not found:
        raise FileNotFoundError(f"{SCRIPTS[modality]} is in none of {[str(folder) for folder in _FOLDERS]}.")
    return found[0]


def arguments_of(path: str | Path) -> list[str]:
    """The arguments that a YAML file holds, as a command line has them.

    A list becomes several values, a mapping JSON, and null leaves the argument out.

    Args:
        path (`str` or `Path`): Of a mapping from names of arguments, without dashes, to values.

    Raises:
        ValueError: The file holds no such mapping.
    """
    values = yaml.safe_load(Path(path).read_text())
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"`--config` {str(path)!r} must map names of arguments to values, but holds {values!r:.80}.")
    arguments = []
    for name, value in values.items():
        if value is not None:
            shown = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, Mapping) else value]
            arguments += [f"--{name}", *map(str, shown)]
    return arguments


def start(script: Path, arguments: Sequence[str], launcher: Sequence[str] = ()) -> int:
    """Runs an example to its end and returns its exit code.

    Args:
        script (`Path`): Its file.
        arguments (`Sequence[str]`): Its arguments.
        launcher (`Sequence[str]`, *optional*): Arguments of `accelerate launch`; without any it is one process.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher] if launcher else [sys.executable]
    return subprocess.run([*command, str(script), *arguments]).returncode
