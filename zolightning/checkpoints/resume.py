"""Which checkpoint ``--ckpt_path`` means, and the folder in which a resumed run continues, even if it was moved."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.checkpoints.checkpoint_io import LAST, LOCK, is_pickle, is_written
from zolightning.checkpoints.ledger import LEDGER
from zolightning.messages import some
from zolightning.partners import find_callbacks

if TYPE_CHECKING:
    from jsonargparse import Namespace  # a package of the command line, which others do without

_FOLDER = "checkpoints"  # of a run, next to its config.yaml
_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")  # in the state of a ModelCheckpoint


def find_checkpoint(config: "Namespace", of_ledgers: bool) -> None:
    """Replaces ``last`` and ``best`` in ``ckpt_path`` by the path of a file.

    They refer to the run whose ``config.yaml`` is among the config files, or else to ``checkpoint.dirpath``, or else to
    the newest version of the run with a ``last.ckpt``, which also says which checkpoint is the best. For a run that was
    killed before its first checkpoint, ``last`` is its ledger.

    Args:
        config: the config of a subcommand, with the run's name in ``trainer.logger``.
        of_ledgers: whether a ledger is accepted.

    Raises:
        MisconfigurationException: if there is no such file, or it is not complete; with where it was looked for.
    """
    path = config.get("ckpt_path")
    if path is None or "://" in str(path):
        return
    if path in ("last", "best"):
        last = _last_of_a_run(config, of_ledgers and path == "last")
        path = last if path == "last" else _best_checkpoint(last, config)
        config.ckpt_path = str(path)
    elif Path(path).is_dir() and not (Path(path) / ".metadata").is_file():
        inside = [str(file) for file in sorted(Path(path).rglob("*.ckpt"))]
        there = f"Give one of the files in it: {some(inside)}." if inside else "It holds no checkpoint (*.ckpt)."
        raise MisconfigurationException(f"`ckpt_path` is {path}, which is a folder. {there}")
    elif not str(path).endswith(".ckpt") and not is_ledger(path):
        return  # words of Lightning's own, or a folder of shards
    if is_ledger(path) and of_ledgers:
        return
    if not Path(path).is_file():
        raise MisconfigurationException(f"`ckpt_path` is {path}, which is not a file.")
    if not zipfile.is_zipfile(path) and not is_pickle(Path(path)):
        ledger = Path(path).absolute().parents[1] / LEDGER
        other = f" Its run can resume from its ledger: --ckpt_path {ledger}" if of_ledgers and ledger.is_file() else ""
        raise MisconfigurationException(f"`ckpt_path` is {path}, which is empty, truncated or not a checkpoint.{other}")


def is_ledger(path: Any) -> bool:
    """Whether a path is that of a ledger, from which a run is resumed without a checkpoint."""
    return path is not None and Path(str(path)).name == LEDGER


def take_name(config: "Namespace") -> None:
    """Gives a run without a name that resumes another run's last step the name and the folder of that run."""
    folder, settings = _folder_of(config.get("ckpt_path")), folder_settings(config.trainer.logger)
    if folder is None or settings is None or settings.get("name") not in (None, "lightning_logs"):
        return
    settings.save_dir, settings.name = str(folder.parent.parent), folder.parent.name


def go_on_in_folder(config: "Namespace") -> bool:
    """Makes a run that resumes from the ``last.ckpt`` or the ledger of a folder write its logs and checkpoints there.

    It gets the same version of TensorBoard's logger, unless the command gives another name or version. From any other
    checkpoint a run continues in a new version, and the old one keeps its later steps. The folder may have been moved
    since, or its name may be relative to another working directory.

    Returns:
        Whether the run continues in its folder.

    Raises:
        MisconfigurationException: if another process still trains there.
    """
    folder, settings = _folder_of(config.get("ckpt_path")), folder_settings(config.trainer.logger)
    if folder is None or settings is None or settings.get("version") is not None:
        return False
    if _versions_folder(config).resolve() != folder.parent:
        if not _is_by_config_of(folder, settings):
            return False
        settings.save_dir = str(folder.parents[1])
    for file in (folder / LEDGER, folder / _FOLDER / LOCK):  # before anything in the folder is written anew
        if file.is_file() and is_written(file):
            raise MisconfigurationException(
                f"`ckpt_path` is of a run that has not ended: another process writes {file}. Wait for it, or stop it."
            )
    settings.version = int(folder.name.removeprefix("version_"))
    return True


def folder_settings(logger: Any) -> Any | None:
    """The settings of the logger that gives a run its folder, TensorBoard's, as ``trainer.logger`` has them.

    Args:
        logger: the logger or the loggers of a run, in the form of jsonargparse or as plain values.
    """
    for each in logger if isinstance(logger, list) else [logger]:
        if hasattr(each, "get") and str(each.get("class_path")).endswith("TensorBoardLogger"):
            return each.get("init_args")
    return None


def _is_by_config_of(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the logger's settings are those in the config.yaml of a run's folder, which still has the run's name."""
    try:
        read = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        own = folder_settings(read["trainer"]["logger"]) or {}
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        return False
    same = all(own.get(name) == settings.get(name) for name in ("save_dir", "name"))
    return same and folder.parent.name == own.get("name")


def _folder_of(path: Any) -> Path | None:
    """The folder of the run of which a file is the last checkpoint or the ledger; None if it is neither."""
    if path is None or "://" in str(path):
        return None
    file = Path(path).resolve()
    for last in (f"{_FOLDER}/{LAST}", LEDGER):
        if re.search(rf"/version_\d+/{re.escape(last)}$", str(file)) and (file.is_file() or is_ledger(file)):
            return file.parents[last.count("/")]
    return None


def _last_of_a_run(config: "Namespace", of_ledgers: bool) -> Path:
    for file in reversed(config.get("config") or []):
        folder = Path(str(file)).absolute().parent
        is_early = of_ledgers and re.fullmatch(r"version_\d+", folder.name) is not None  # killed before any checkpoint
        if Path(str(file)).name == "config.yaml" and (is_early or (folder / _FOLDER).is_dir()):
            last = folder / _FOLDER / LAST
            return folder / LEDGER if of_ledgers and not last.is_file() else last
    if config.checkpoint.dirpath is not None:
        return Path(config.checkpoint.dirpath) / LAST
    versions = _versions_folder(config)
    found = {_version(file.parents[1]): file for file in versions.glob(f"version_*/{_FOLDER}/{LAST}")}
    if of_ledgers:
        found = {_version(file.parent): file for file in versions.glob(f"version_*/{LEDGER}")} | found
    if not found:
        raise MisconfigurationException(
            f"`ckpt_path` is '{config.ckpt_path}', but no version of this run in {versions} has a {_FOLDER}/{LAST}. "
            "Give the path of a checkpoint, or the config.yaml of the run as --config."
        )
    return found[max(found)]


def _best_checkpoint(last: Path, config: "Namespace") -> Path:
    if not last.is_file():
        raise MisconfigurationException(f"`ckpt_path` is 'best', but {last}, which names it, is not a file.")
    for state in callback_states(last).values():
        if state.get("monitor") == config.checkpoint.monitor and state.get("best_model_path"):
            return last.parent / Path(state["best_model_path"]).name  # the folder may have been moved
    raise MisconfigurationException(
        f"`ckpt_path` is 'best', but {last} names no best one by `{config.checkpoint.monitor}`: the run has not "
        "validated yet. Use 'last'."
    )


def callback_states(path: str | Path) -> dict[str, Any]:
    """The states of callbacks in a checkpoint; its weights are not read."""
    states: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["callbacks"]
    return states


def _versions_folder(config: "Namespace") -> Path:
    settings = folder_settings(config.trainer.logger) or {}
    return Path(settings.get("save_dir") or config.trainer.default_root_dir) / str(settings.get("name") or "")


def _version(folder: Path) -> tuple[int, str]:
    number = folder.name.removeprefix("version_")
    return int(number) if number.isdigit() else -1, number


def find_files_again(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Changes the paths in a checkpoint to those of the same files next to it, in the folder where the run resumes.

    To be called before the states of callbacks are loaded: Lightning compares the folder's old name with the new one,
    and forgets the best checkpoint if they differ.
    """
    here = Path(str(trainer.ckpt_path)).resolve().parent
    for callback in find_callbacks(trainer, ModelCheckpoint):
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if state and callback.dirpath and Path(callback.dirpath).resolve() == here:
            checkpoint["callbacks"][callback.state_key] = _in_folder(state, Path(callback.dirpath))
            callback.current_score = state.get("current_score")  # which Lightning forgets


def _in_folder(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    def there(path: str) -> str:
        return path and str(folder / Path(path).name)

    paths = {name: there(state[name]) for name in _PATHS if name in state}
    best = {there(path): score for path, score in state.get("best_k_models", {}).items()}
    return state | paths | {"best_k_models": best, "dirpath": str(folder)}
