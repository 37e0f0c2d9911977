"""What the examples say of the data they bring along: one run of each, whose numbers README and docs show.

    python benchmarks/studies/demos.py [--demos speech digits videos captions people]

One thread each. A run that is on record is not made again: after a change of an example, remove its record.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from harness import RESULTS, Records


EXAMPLES = Path(__file__).parents[2] / "examples"
# the script and its arguments, and the folder that it writes
DEMOS = {
    "speech": (["unlearn_asr.py"], "out/demo"),
    "digits": (["unlearn_image.py"], "out/digits"),
    "videos": (["unlearn_image.py", "--video"], "out/videos"),
    "captions": (["unlearn_image_text.py"], "out/captions"),
    "people": (["unlearn_text.py"], "out/people"),
}


def run(name: str, folder: Path) -> dict:
    """The example in a process of its own: accuracy or error of each model on each set, relearning, and time."""
    (script, *arguments), written = DEMOS[name]
    folder.mkdir(parents=True, exist_ok=True)
    own = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    subprocess.run(command, check=True, cwd=folder, env=own, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    report = json.loads((folder / written / "unlearning_report.json").read_text())
    record = {
        "seconds": seconds,
        "unlearning": report["cost"]["unlearning"],
        "models": {
            who: {set_name: quality["value"] for set_name, quality in sets.items()}
            for who, sets in report["models"].items()
        },
        "relearning": {
            attack: {who: [[point["step"], point["value"]] for point in curve] for who, curve in curves.items()}
            for attack, curves in report["relearning"].items()
        },
    }
    results = folder / written / "results.json"
    if results.exists():  # runs that are compared, in several rates
        rows = json.loads(results.read_text())["rows"]
        rates = ("wer", "cer")
        record["rows"] = {
            method: {
                name: {rate: value[rate] for rate in rates}
                for name, value in row.items()
                if isinstance(value, dict) and set(rates) <= set(value)
            }
            for method, row in rows.items()
        }
    return record


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demos", nargs="+", choices=list(DEMOS), default=list(DEMOS))
    parser.add_argument("--work_folder", type=Path, default=Path("out/studies/demos"))
    asked = parser.parse_args()
    torch.set_num_threads(1)  # as many as the examples have: the record says so
    records = Records(RESULTS / "demos.json")
    for name in asked.demos:
        records.get(name, lambda name=name: run(name, asked.work_folder.resolve() / name))
