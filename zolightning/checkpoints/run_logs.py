"""What a Trainer's loggers are told when steps come again that were logged before."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger


class Muted:
    """Puts loggers that write nothing in the place of a Trainer's.

    Args:
        trainer: whose loggers they are.
        until: the first step that is to be logged.
    """

    def __init__(self, trainer: L.Trainer, until: int) -> None:
        self.until = until
        self._loggers: list[Logger] = trainer.loggers
        trainer.loggers = [DummyLogger() for _ in self._loggers]

    def end(self, trainer: L.Trainer) -> None:
        """Gives the Trainer its loggers back."""
        trainer.loggers = self._loggers


def log_once(trainer: L.Trainer) -> None:
    """Has TensorBoard's loggers leave out what their folders have, of the steps from now on.

    That is of the step in which a process was killed, after it was logged and before it was over.
    """
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    except ModuleNotFoundError:  # of a process without such a logger
        return
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, TensorBoardLogger):
            files = sorted(Path(logger.log_dir).glob("events.out.tfevents.*"))
            events = (event for file in files for event in EventFileLoader(str(file)).Load())
            later = (event for event in events if event.step >= trainer.global_step)
            _leave_out(logger.experiment, {(value.tag, event.step) for event in later for value in event.summary.value})


def _leave_out(writer: Any, there: set[tuple[str, int]]) -> None:
    file_writer = writer._get_file_writer()
    add_summary = file_writer.add_summary

    def add_new(summary: Any, global_step: int | None = None, walltime: float | None = None) -> None:
        if any((value.tag, global_step) not in there for value in summary.value):
            add_summary(summary, global_step, walltime)

    file_writer.add_summary = add_new
