"""The output folder of a command, and the messages and callbacks that it leaves out."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import lightning_utilities.core.rank_zero as rank_zero
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import SaveConfigCallback

from zolightning.callbacks import PredictionWriter, RunMonitor, RunOverview
from zolightning.checkpoints.checkpoint_io import require_writable
from zolightning.partners import callbacks_of

_OF_A_RUN = (Checkpoint, ModelSummary, PredictionWriter, ProgressBar, RunMonitor, RunOverview, SaveConfigCallback)


def output_folder(trainer: L.Trainer, output: str | None, name: str) -> Path:
    """Makes the folder `output` or, if it is not given, `name` beside the versions of the run.

    Raises:
        ValueError: if nothing can be written there.
    """
    folder = _versions_folder(trainer) / name if output is None else Path(output)
    require_writable("output", folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def require_new_folder(name: str, folder: Path) -> None:
    """Raises a ValueError that names a setting unless its folder is empty or not there, and can be written to."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`{name}` is {folder}, which is not empty. Name a new folder.")
    require_writable(name, folder)


def _versions_folder(trainer: L.Trainer) -> Path:
    logger = trainer.logger
    if logger is None or logger.save_dir is None:
        return Path(trainer.default_root_dir)
    return Path(logger.save_dir) / (logger.name or "")


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
    # Advertisements too. Loggers do not inherit filters: this is the one that Lightning's rank_zero_info writes to.
    rank_zero.log.addFilter(lambda record: "try installing [lit" not in record.getMessage())
