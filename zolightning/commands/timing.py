"""Times several pieces of work, which take turns."""

import time
from collections.abc import Callable, Mapping

import torch


def round_robin(
    work: Mapping[str, Callable[[], object]], repeats: int, say: Callable[[str], object] = lambda progress: None
) -> dict[str, list[float]]:
    """Seconds of each repetition of each piece of work.

    They take turns, so that whatever else the machine is doing slows them alike. A first round is not timed.

    Args:
        work: what is to be timed, by name.
        repeats: timed rounds.
        say: called at the beginning of each round with a text that says which round it is.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        say(f"round {repeat} of {repeats}" if repeat else "a round that does not count")
        for name, call in work.items():
            elapsed = seconds_of(call)
            if repeat:
                seconds[name].append(elapsed)
    return seconds


def seconds_of(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds until `call` has returned and, if a GPU is in use, all work queued on it is done."""
    start = clock()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock() - start
