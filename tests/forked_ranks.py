"""Ranks of a run as forks of one process that has imported everything: that takes seconds, a fork none."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path


def fork_ranks(ranks: int, function: Callable[[], None], errors: Path, seconds: float = 120) -> list[int | None]:
    """Calls a function in each of some processes that Lightning takes for the ranks of a run.

    Args:
        ranks: of the run.
        function: whose Trainer has as many devices.
        errors: folder and beginning of the names of files that get the traceback of a rank that fails.
        seconds: after which ranks are killed.

    Returns:
        The exit code of each, as of ``multiprocessing``.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [get_context("fork").Process(target=_run, args=(r, port, function, errors)) for r in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _run(rank: int, port: int, function: Callable[[], None], errors: Path) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        function()
    except BaseException:
        Path(f"{errors}-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)  # without waiting for the others in a process group
    sys.stdout.flush()
    os._exit(0)
