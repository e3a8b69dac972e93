"""A run that is refused before its first step leaves its folder as it found it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from zolightning.checkpoints.checkpoint_io import replacing, without_new_folders
from zolightning.commands.metrics_files import CURVES, METRICS
from zolightning.partners import tensorboards

_WRITTEN_ANEW = ("config.yaml", METRICS, CURVES)  # by every command that goes on in a folder


class LeaveAsFound(Callback):
    """Undoes what a command has written to its run's folder, if an error ends it before it trains on a batch.

    Lightning's loggers create their files, and its command line ``config.yaml``, before rows, weights and checkpoints
    are checked: a resumed run would then have the refused settings. If another process has begun to write to the
    folder too, everything is left there.
    """

    def __init__(self) -> None:
        self._has_trained = False

    def on_train_batch_start(self, *_: object) -> None:
        self._has_trained = True

    @contextmanager
    def watch(self, trainer: L.Trainer) -> Iterator[None]:
        """A context in which a command runs; only where TensorBoard's logger gives the run a folder of its own."""
        folder = next((Path(logger.log_dir) for logger in tensorboards(trainer)), None)
        if folder is None:
            yield
            return
        with without_new_folders(folder):
            found = {path: _text(path) for path in folder.iterdir()} if folder.is_dir() else {}
            try:
                yield
            except Exception:
                if not self._has_trained:
                    for logger in trainer.loggers:
                        logger.finalize("failed")  # where the error came between two calls of the Trainer
                    with suppress(OSError):  # the error that is raised says more
                        _undo(folder, found)
                raise


def _text(path: Path) -> bytes | None:
    return path.read_bytes() if path.name in _WRITTEN_ANEW else None


def _undo(folder: Path, found: dict[Path, bytes | None]) -> None:
    new = [path for path in folder.iterdir() if path not in found and path.is_file()]
    own = f".{socket.gethostname()}.{os.getpid()}."
    if any(path.name.startswith("events.out.tfevents.") and own not in path.name for path in new):
        return
    for path in new:
        path.unlink()
    for path, text in found.items():
        if text is not None and path.read_bytes() != text:
            with replacing(path) as file:
                file.write(text)
