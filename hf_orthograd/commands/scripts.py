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
OWN_ARGUMENTS = ("config", "num_processes", "accelerate_config")
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

    A list becomes several values, a mapping JSON. Null and an empty list leave the argument out.

    Args:
        path (`str` or `Path`): Of a mapping from names of arguments, without dashes, to values.

    Raises:
        ValueError: The file holds no such mapping, an argument of the command itself, or a list of what is no text or number.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"`--config` {str(path)!r} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"`--config` {str(path)!r} must map names of arguments to values, but holds {values!r:.80}.")
    own = [name for name in OWN_ARGUMENTS if name in values]
    if own:
        raise ValueError(
            f"`--config` {str(path)!r} holds {', '.join(own)}, which the command takes itself: pass it there."
        )
    arguments = []
    for name, value in values.items():
        if isinstance(value, list):
            arguments += _several(name, value)
        elif value is not None:
            # joined by a sign, as a value may begin with a minus
            arguments.append(f"--{name}={json.dumps(value) if isinstance(value, Mapping) else value}")
    return arguments


def _several(name: str, values: list) -> list[str]:
    wrong = [
        one for one in values if isinstance(one, bool | Mapping | list) or one is None or str(one).startswith("-")
    ]
    if wrong:
        raise ValueError(
            f"`--config`: `{name}` holds {wrong[0]!r}, but must hold texts and numbers. Put texts in quotes."
        )
    return [f"--{name}", *map(str, values)] if values else []


def start(
    script: Path, arguments: Sequence[str], *, num_processes: int | None = None, config: str | None = None
) -> int:
    """Runs an example to its end and returns its exit code.

    Args:
        script (`Path`): Its file.
        arguments (`Sequence[str]`): Its arguments.
        num_processes (`int`, *optional*): Starts so many processes: by `accelerate launch`, and without an accelerator, where
            that would need MPI, by `torchrun`.
        config (`str`, *optional*): A file of Accelerate's.
    """
    import torch  # slow to load, and the example loads it for itself

    command = [sys.executable]
    if config is not None or (num_processes is not None and torch.accelerator.is_available()):
        command += ["-m", "accelerate.commands.launch"]
        command += [] if config is None else ["--config_file", config]
        command += [] if num_processes is None else ["--num_processes", str(num_processes)]
    elif num_processes is not None:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(num_processes)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        if not any(argument.startswith("--use_cpu") for argument in arguments):
            arguments = [*arguments, "--use_cpu", "1"]  # else each process would train by itself
    return subprocess.run([*command, str(script), *arguments]).returncode
