"""Prints tables, and times pieces of work in turns."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Record = Mapping[str, Any]  # of texts, numbers and None


def print_table(title: str, records: Sequence[Record]) -> None:
    """Prints records that have the same keys, which head the columns."""
    lines = [list(records[0]), *([_text(value) for value in record.values()] for record in records)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def round_robin(work: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repetition of each piece of work.

    They take turns, so that whatever else the machine is doing slows them alike. A first round is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, call in work.items():
            elapsed = seconds_of(call)
            if repeat:
                seconds[name].append(elapsed)
    return seconds


def seconds_of(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds until `call` has returned and the GPU, if one is in use, has done what it was told."""
    start = clock()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock() - start


def _text(value: str | int | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return str(value)
