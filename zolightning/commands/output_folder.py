"""The folder to which a command writes."""

from pathlib import Path

import lightning as L

from zolightning.checkpoints.checkpoint_io import require_writable


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
