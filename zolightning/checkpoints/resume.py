"""Which checkpoint ``--ckpt_path`` means, and the folder in which a resumed run goes on."""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.utilities.exceptions import MisconfigurationException

LAST = "last.ckpt"
LEDGER = "ledger.bin"
_FOLDER = "checkpoints"  # of a run, beside its config.yaml


def find_checkpoint(config: Namespace) -> None:
    """Puts the path of a file in the place of ``last`` and ``best`` in ``ckpt_path``.

    They mean the run whose ``config.yaml`` is among the config files; else ``checkpoint.dirpath``; else the newest
    version of the run that has a ``last.ckpt``. The best one is what that file says.

    Args:
        config: of a subcommand, with the run's name in ``trainer.logger``.

    Raises:
        MisconfigurationException: if there is no such file, or it is not a whole one; with where it was looked for.
    """
    path = config.get("ckpt_path")
    if path is None or "://" in str(path):
        return
    if path in ("last", "best"):
        last = _last_checkpoint(config)
        path = last if path == "last" else _best_checkpoint(last, config)
        config.ckpt_path = str(path)
    elif not str(path).endswith(".ckpt"):
        return  # words of Lightning's own, or a folder of shards
    if not Path(path).is_file():
        raise MisconfigurationException(f"`ckpt_path` is {path}, which is not a file.")
    if not zipfile.is_zipfile(path) and not _is_pickle(Path(path)):
        raise MisconfigurationException(f"`ckpt_path` is {path}, which is empty, cut off or no checkpoint.")


def take_name(config: Namespace) -> None:
    """Calls a run that has no name, and resumes from the ``last.ckpt`` of another, by that one's name and folder."""
    path, settings = config.get("ckpt_path"), getattr(config.trainer.logger, "init_args", None)
    if settings is None or settings.get("name") not in (None, "lightning_logs") or not _is_last_of_a_run(path):
        return
    versions = Path(path).resolve().parents[2]
    settings.save_dir, settings.name = str(versions.parent), versions.name


def go_on_in_folder(config: Namespace) -> bool:
    """Makes a run that resumes from the ``last.ckpt`` of a folder write its logs and checkpoints there.

    It becomes the same version of TensorBoard's logger, unless the command gives another name or version. From any
    other checkpoint a run goes on in a new version, and what the old one learned after it stays.

    Returns:
        Whether the run goes on in its folder.
    """
    path, logger = config.get("ckpt_path"), config.trainer.logger
    if not _is_last_of_a_run(path) or not str(getattr(logger, "class_path", "")).endswith("TensorBoardLogger"):
        return False
    folder = Path(path).resolve().parents[1]
    if logger.init_args.get("version") is not None or _versions_folder(config).resolve() != folder.parent:
        return False
    logger.init_args.version = int(folder.name.removeprefix("version_"))
    return True


def _is_last_of_a_run(path: Any) -> bool:
    if path is None or "://" in str(path):
        return False
    file = Path(path).resolve()
    return file.is_file() and re.fullmatch(rf"version_\d+/{_FOLDER}/{LAST}", "/".join(file.parts[-3:])) is not None


def _last_checkpoint(config: Namespace) -> Path:
    for file in reversed(config.get("config") or []):
        folder = Path(str(file)).absolute().parent
        if Path(str(file)).name == "config.yaml" and (folder / _FOLDER).is_dir():
            return folder / _FOLDER / LAST
    if config.checkpoint.dirpath is not None:
        return Path(config.checkpoint.dirpath) / LAST
    versions = _versions_folder(config)
    found = sorted(versions.glob(f"version_*/{_FOLDER}/{LAST}"), key=_version)
    if not found:
        raise MisconfigurationException(
            f"`ckpt_path` is '{config.ckpt_path}', and no version of this run in {versions} has a {_FOLDER}/{LAST}. "
            "Give the path of a checkpoint, or the config.yaml of the run as --config."
        )
    return found[-1]


def _best_checkpoint(last: Path, config: Namespace) -> Path:
    if not last.is_file():
        raise MisconfigurationException(f"`ckpt_path` is 'best', and {last}, which names it, is not a file.")
    callbacks: dict[str, Any] = torch.load(last, map_location="cpu", weights_only=True, mmap=True)["callbacks"]
    for state in callbacks.values():
        if state.get("monitor") == config.checkpoint.monitor and state.get("best_model_path"):
            return last.parent / Path(state["best_model_path"]).name  # the folder may have been moved
    raise MisconfigurationException(
        f"`ckpt_path` is 'best', and {last} knows of no best one by `{config.checkpoint.monitor}`: the run has not "
        "validated yet. Use 'last'."
    )


def _versions_folder(config: Namespace) -> Path:
    settings = getattr(config.trainer.logger, "init_args", None) or Namespace()
    return Path(settings.get("save_dir") or config.trainer.default_root_dir) / str(settings.get("name") or "")


def _version(path: Path) -> tuple[int, str]:
    number = path.parent.parent.name.removeprefix("version_")
    return int(number) if number.isdigit() else -1, number


def _is_pickle(path: Path) -> bool:
    """Torch's format before 1.6."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80"
