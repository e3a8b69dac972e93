"""Handles SIGTERM and Ctrl-C as requests to stop after the current step, and SLURM's signal to requeue likewise."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import lightning as L

from zolightning.evaluation.replaced import replaced

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Records a signal instead of letting it end the process.

    Attributes:
        number: number of the last signal since :meth:`listen` that stops the run; 0 if there was none.
        is_requeued: whether :meth:`requeue` is to be called, after a signal to save and requeue the job.
    """

    def __init__(self) -> None:
        self.number = 0
        self.is_requeued = False
        self._handlers: dict[signal.Signals, Any] = {}
        self._requeue: signal.Signals | None = None

    def listen(self, requeue: signal.Signals | None) -> None:
        """Starts recording signals; only in the main thread of a process.

        Args:
            requeue: the signal that Lightning answers by saving a checkpoint and requeueing the job of a cluster: at
                once, in the middle of an update. None if there is no such signal.
        """
        self.number, self.is_requeued, self._requeue = 0, False, requeue
        if threading.current_thread() is threading.main_thread():
            numbers = _SIGNALS if requeue is None else (*_SIGNALS, requeue)
            self._handlers = {number: signal.signal(number, self._on_signal) for number in numbers}

    def requeue(self) -> None:
        """Does what the signal to requeue asked for."""
        self.is_requeued = False
        handler = self._handlers.get(self._requeue) if self._requeue is not None else None
        if callable(handler):  # not with several ranks where this one's is the default
            handler(self._requeue, None)

    def ignore(self) -> None:
        """Restores the handlers from before :meth:`listen`."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == self._requeue:
            self.is_requeued = True
            return
        self.number = number
        if number == signal.SIGINT:
            # Not with `print`, which the signal may have interrupted.
            os.write(2, b"\nThe run stops after this step and is saved. Ctrl-C again stops it at once.\n")
            signal.signal(signal.SIGINT, signal.default_int_handler)


def ending_at_once(trainer: L.Trainer) -> replaced:
    """A context in which SIGTERM ends the process at once wherever no :class:`StopSignal` listens.

    There Lightning's handler would go on for a while, to end with status 0, and broadcast to the other ranks in the
    midst of what they exchange, for which all of them would wait in vain.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(number)  # ranks that Lightning started
        if trainer.is_global_zero:
            os.write(2, b"\nStopped by SIGTERM.\n")
        raise SystemExit(exit_status(trainer, number))

    return replaced(trainer._signal_connector, "_sigterm_notifier_fn", end)


def exit_status(trainer: L.Trainer, number: int) -> int:
    """128 plus the signal, as in shells; 0 for processes that Lightning started, whose failure would kill the first."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    is_started = trainer.local_rank > 0 and environment is not None and not environment.creates_processes_externally
    return 0 if is_started else 128 + number
