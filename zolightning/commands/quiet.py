"""What a command does not show: messages of libraries, and what the callbacks of a run show and write."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import lightning_utilities.core.rank_zero as rank_zero
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import SaveConfigCallback

from zolightning.callbacks import PredictionWriter, RunMonitor, RunOverview
from zolightning.partners import callbacks_of

_OF_A_RUN = (Checkpoint, ModelSummary, PredictionWriter, ProgressBar, RunMonitor, RunOverview, SaveConfigCallback)


def silent_callbacks(trainer: L.Trainer) -> list[Callback]:
    """The callbacks that take part in training, without those that show or write."""
    return [callback for callback in callbacks_of(trainer) if not isinstance(callback, _OF_A_RUN)]


@contextmanager
def quiet() -> Iterator[None]:
    """A context without the messages of Lightning's Trainers about devices and their end; warnings are shown."""
    level = rank_zero.log.level
    rank_zero.log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        rank_zero.log.setLevel(level)


def hush() -> None:
    """Switches off messages of Lightning and torch that a user of the command line can do nothing about."""
    for message in (
        ".*does not have many workers.*",  # batches are tokenized already; a worker would only copy them
        ".*LeafSpec.* is deprecated.*",  # Lightning 2.6 on a newer torch
        ".*torch.jit.script.* is deprecated.*",  # torch itself, when it first differentiates in forward mode
        ".*not supported by the model summary.*",  # about a number of megabytes
        # Weights after the update are what a checkpoint should hold.
        "Using ModelCheckpoint with manual optimization.*",
    ):
        warnings.filterwarnings("ignore", message)
    # Loggers do not inherit filters: this is the one that rank_zero_info of Lightning writes to.
    rank_zero.log.addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "try installing [lit" not in record.getMessage()
