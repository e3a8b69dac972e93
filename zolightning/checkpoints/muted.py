"""Loggers of a Trainer that are told nothing for a while."""

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger


class Muted:
    """Puts loggers that write nothing in the place of a Trainer's, while steps come again that were logged before.

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
