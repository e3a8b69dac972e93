"""SIGTERM and Ctrl-C as a request that training reads between two steps."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import lightning as L
import torch

from zolightning.ranks import one_line_errors

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Takes note of a signal instead of ending the process.

    Attributes:
        number: of the signal that came since :meth:`listen`; 0 if none did.
    """

    def __init__(self) -> None:
        self.number = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """From now on; only the main thread of a process can."""
        self.number = 0
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def ignore(self) -> None:
        """Signals do again what they did before :meth:`listen`."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT:
            # Not by `print`, which may be what the signal interrupted.
            os.write(2, b"\nThe run stops after this step and is saved. Ctrl-C again stops it at once.\n")
            signal.signal(signal.SIGINT, signal.default_int_handler)


def largest_of_ranks(trainer: L.Trainer, *values: int) -> list[int]:
    """The largest of the values that the ranks have, one by one."""
    if trainer.world_size == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.int32, device=trainer.strategy.root_device)
    with one_line_errors(trainer):
        return trainer.strategy.reduce(tensor, reduce_op="max").tolist()


def exit_status(trainer: L.Trainer, number: int) -> int:
    """128 and the signal, as shells say it; 0 for processes that Lightning started, whose failure kills the first."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    is_started = trainer.local_rank > 0 and environment is not None and not environment.creates_processes_externally
    return 0 if is_started else 128 + number
