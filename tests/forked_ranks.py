"""Programs and ranks as forks of a process that has imported everything: that takes seconds, a fork none."""

import atexit
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch

import zolightning

# Its process imports these once, which takes as long as many a program, and forks for each program.
_SERVER = get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        *("lightning", "tensorboard.backend.event_processing.event_accumulator", "torch.distributed.fsdp"),
        *("torchdata.stateful_dataloader", "zolightning.callbacks", "zolightning.strategies"),
    ]
)


def run_program(path: str, folder: Path, *arguments: object, seconds: float = 240) -> Path:
    """Runs a program that forks, with a folder to write to, which is returned; its log is ``log.txt`` there."""
    words, log = [path, str(folder), *map(str, arguments)], folder / "log.txt"
    process = _SERVER.Process(target=_run_program, args=(words, log, zolightning.__file__))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode == 0, log.read_text()[-4000:]
    return folder


def _run_program(words: list[str], log: Path, package: str) -> None:
    assert zolightning.__file__ == package
    with log.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED"):
        os.environ.pop(name, None)  # started by Lightning
    torch.set_num_threads(1)
    sys.argv, sys.path[:0] = words, [str(Path(words[0]).parent)]
    runpy.run_path(words[0], run_name="__main__")


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


def end_process() -> None:
    """Does what a process does at its end, which a fork leaves out, and looks whether it has left its group."""
    atexit._run_exitfuncs()
    assert not torch.distributed.is_initialized()


def _run(rank: int, port: int, function: Callable[[], None], errors: Path) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        function()
    except BaseException:
        Path(f"{errors}-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)  # without waiting for the others in a process group
    sys.stdout.flush()
    os._exit(0)
