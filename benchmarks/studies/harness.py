"""What the studies share: trained models kept on disk, one JSON record for each run, and resuming from both."""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import accelerate
import torch
import transformers
from filelock import FileLock


RESULTS = Path(__file__).parent.parent / "results"


class Records:
    """Finished runs of a study, by name, in a JSON file that is replaced whole after every one.

    Several processes may share the file, each making records of other names.
    """

    def __init__(self, path: Path):
        self._path = path
        self.runs = self._read()

    def get(self, name: str, make: Callable[[], dict], complete: str | None = None) -> dict:
        """The record of that name, made now if there is none, or none with an entry `complete`."""
        if not self._has(name, complete):
            self.runs = self._read()  # another process may have made it by now
        if not self._has(name, complete):
            started = time.perf_counter()
            record = make()
            print(f"{time.strftime('%H:%M:%S')} {name}: {time.perf_counter() - started:.0f} s", flush=True)
            self._keep(name, record)
        return self.runs[name]

    def _has(self, name: str, complete: str | None) -> bool:
        return name in self.runs and (complete is None or complete in self.runs[name])

    def _read(self) -> dict[str, dict]:
        return json.loads(self._path.read_text())["runs"] if self._path.exists() else {}

    def _keep(self, name: str, record: dict) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._path.with_suffix(".lock")):
            self.runs = self._read()
            self.runs[name] = record
            partial = self._path.with_suffix(".partial")
            lines = [f"{json.dumps(name)}: {json.dumps(record)}" for name, record in self.runs.items()]
            runs = ",\n".join(lines)  # one line for each run
            partial.write_text(f'{{"machine": {json.dumps(self._machines())},\n"runs": {{\n{runs}\n}}}}\n')
            partial.replace(self._path)

    def _machines(self) -> dict[str, str] | list[dict[str, str]]:
        """That on which the runs were made, or all if there were several."""
        found = json.loads(self._path.read_text())["machine"] if self._path.exists() else []
        found = found if isinstance(found, list) else [found]
        machines = [*found, *([describe_machine()] if describe_machine() not in found else [])]
        return machines if len(machines) > 1 else machines[0]


def describe_machine() -> dict[str, str]:
    """Versions and processor, as they stand beside every number."""
    return {
        "processor": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{os.cpu_count()} cores {_processor()}, {torch.get_num_threads()} used",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def machine_note() -> str:
    """What a table says below itself."""
    machine = describe_machine()
    versions = ", ".join(f"{name} {version}" for name, version in machine.items() if name != "processor")
    return f"({machine['processor']}; {versions}. Other runs shared the machine: times are rough.)"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def trained_model(folder: Path, build: Callable, train: Callable, load: Callable):
    """The model saved in `folder`; built, trained and saved there first if it is missing."""
    if not (folder / "config.json").exists():
        started = time.perf_counter()
        model = build()
        train(model)
        partial = folder.with_name(folder.name + ".partial")
        model.save_pretrained(partial)
        partial.replace(folder)
        print(f"trained {folder.name} in {time.perf_counter() - started:.0f} s", flush=True)
    return load(folder)
