"""Several processes that find one another as under a launch, without a launch's cost.

They are forked from one process that has imported everything, once for a whole test run: to import it in each takes longer than to train.
"""

import gc
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

import torch


PRELOADED = "launched"
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([PRELOADED])
# libraries read these when they are imported, which is before a process is forked
_WHEN_IMPORTED = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_in_processes(count: int, folder: Path, call: Callable, *arguments, timeout: float = 300) -> None:
    """Calls a function of a module in `count` processes, with the variables that `torchrun` sets; what they print goes to files in `folder`."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the port is taken already
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    with mock.patch.dict(os.environ, _WHEN_IMPORTED):
        forkserver.ensure_running()
    processes = []
    for rank in range(count):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        given = own, folder / f"output-{rank}.txt", call.__module__, call.__name__, arguments
        processes.append(_FORKS.Process(target=_enter, args=given))
        processes[-1].start()
    end = time.monotonic() + timeout
    try:
        while running := [one for one in processes if one.exitcode is None]:
            ended = wait([one.sentinel for one in running], timeout=max(0.0, end - time.monotonic()))
            assert ended, f"not done after {timeout} s"
            _check(processes, folder)
        _check(processes, folder)
    finally:
        for one in processes:  # one that failed leaves the others waiting
            one.kill()
            one.join()


def _check(processes: list, folder: Path) -> None:
    for rank, process in enumerate(processes):
        if process.exitcode not in (None, 0):
            output = folder / f"output-{rank}.txt"
            raise AssertionError(output.read_text()[-3000:] if output.exists() else f"process {rank} did not begin")


def _enter(environment: dict[str, str], output: Path, module: str, name: str, arguments: tuple) -> None:
    """The function goes by its name: unpickled, it would import what was to be there already."""
    os.environ.update(environment)
    gc.freeze()  # what was imported is not walked over whenever a run begins
    with output.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    assert PRELOADED in sys.modules, "imported once more in each process"
    getattr(importlib.import_module(module), name)(*arguments)
