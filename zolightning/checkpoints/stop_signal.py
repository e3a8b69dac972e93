"""Handles SIGTERM and Ctrl-C as requests to stop after the current step."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import lightning as L

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Records a signal instead of letting it end the process.

    Attributes:
        number: number of the last signal since :meth:`listen`; 0 if there was none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Starts recording signals; only in the main thread of a process."""
        self.number = 0
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def ignore(self) -> None:
        """Restores the handlers from before :meth:`listen`."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT:
            # Not with `print`, which the signal may have interrupted.
            os.write(2, b"\nThe run stops after this step and is saved. Ctrl-C again stops it at once.\n")
            signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_status(trainer: L.Trainer, number: int) -> int:
    """128 plus the signal, as in shells; 0 for processes that Lightning started, whose failure would kill the first."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    is_started = trainer.local_rank > 0 and environment is not None and not environment.creates_processes_externally
    return 0 if is_started else 128 + number
