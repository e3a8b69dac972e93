"""What SaveLast has to do with the other ModelCheckpoints of a run: it takes their folder, and refuses their file."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.partners import find_callbacks


def folder_of_others(trainer: L.Trainer, save_last: ModelCheckpoint) -> Any:
    """The folder of the run's first ModelCheckpoint beside a SaveLast, as far as it is known; None without one."""
    return next((other.dirpath for other in _others(trainer, save_last)), None)


def refuse_two_last_steps(trainer: L.Trainer, save_last: ModelCheckpoint) -> None:
    """Refuses a callback that keeps a last step, or a file by the same name, in the folder of a SaveLast.

    Raises:
        MisconfigurationException: naming the callback and its ``save_last`` or ``filename``.
    """
    folder = save_last.dirpath or folder_of_others(trainer, save_last)
    for other in _others(trainer, save_last):
        if other.dirpath == folder and other.filename == save_last.filename:
            raise MisconfigurationException(
                f"`filename` of {type(other).__name__} is {other.filename!r}, but SaveLast keeps the last step in the "
                "same folder by this name. Choose another one."
            )
        if other.dirpath == folder and other.save_last:
            raise MisconfigurationException(
                f"`save_last` of {type(other).__name__} is {other.save_last!r}, but SaveLast keeps the last step in "
                'the same folder: `ckpt_path="last"` would pick one of two files, maybe the older one. Leave '
                "`save_last` out."
            )


def _others(trainer: L.Trainer, save_last: ModelCheckpoint) -> list[ModelCheckpoint]:
    return [callback for callback in find_callbacks(trainer, ModelCheckpoint) if callback is not save_last]
