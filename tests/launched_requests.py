"""A history of requests under a launch."""

import json
from pathlib import Path

from accelerate import PartialState
from histories import maker
from launched import leave_together, samples
from published import rows

from hf_orthograd.requests import RequestHistory


def go_through(folder: Path) -> None:
    """What each process does with a folder that holds "original"; it writes what it was told to a file of its own."""
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
    leave_together()
