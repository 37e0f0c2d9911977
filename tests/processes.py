"""Several processes that find one another as under a launch, without a launch's cost.

They are forked from one process that has imported everything, once for a whole test run: to import it in each takes longer than to train.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import torch


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["launched"])


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
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    processes = []
    for rank in range(count):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(_FORKS.Process(target=_enter, args=(own, folder / f"output-{rank}.txt", call, arguments)))
        processes[-1].start()
    end = time.monotonic() + timeout
    try:
        while running := [one for one in processes if one.exitcode is None]:
            done = wait([one.sentinel for one in running], timeout=max(0.0, end - time.monotonic()))
            failed = [rank for rank, one in enumerate(processes) if one.exitcode not in (None, 0)]
            assert done, f"not done after {timeout} s"
            assert not failed, (folder / f"output-{failed[0]}.txt").read_text()[-3000:]
    finally:
        for one in processes:  # one that failed leaves the others waiting
            one.kill()
            one.join()


def _enter(environment: dict[str, str], output: Path, call: Callable, arguments: tuple) -> None:
    os.environ.update(environment)
    with output.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    call(*arguments)
