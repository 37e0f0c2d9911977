"""A history of requests under a launch: python -m torch.distributed.run --nproc-per-node 2 tests/launched_requests.py FOLDER

FOLDER holds "original". Each process writes what it was told to a file of its own.
"""

import json
import os
import sys
from pathlib import Path

from accelerate import PartialState
from histories import maker
from launched import samples
from published import rows

from hf_orthograd.requests import RequestHistory


def main() -> None:
    folder = Path(sys.argv[1])
    history = RequestHistory.create(folder / "history", folder / "original")
    make, told = maker(rows(samples("vit", 8, seed=9)), max_steps=2), {}
    told["added"] = [history.add(rows(samples("vit", 4, seed=n)), request_id=f"case-{n}").number for n in (1, 2, 3)]
    history.withdraw(3)
    told["done"] = [request.number for request in history.run(make)]
    told["undone"] = [request.number for request in history.roll_back(1)]
    told["again"] = [request.number for request in history.run(make)]
    told["problems"] = [one.problems for one in history.check(make)]
    history.delete_data(1, salt=True)
    told["refused"] = []
    for refused in (
        lambda: history.delete_data(7),
        lambda: RequestHistory.create(history.folder, folder / "original"),
    ):
        try:
            refused()
        except (ValueError, RuntimeError) as error:
            told["refused"].append(str(error))
    (folder / f"{PartialState().process_index}.json").write_text(json.dumps(told))
    PartialState().wait_for_everyone()
    os._exit(0)  # taking gloo's threads down in order aborts or hangs now and then


if __name__ == "__main__":
    main()
