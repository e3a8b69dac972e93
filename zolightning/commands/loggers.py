"""The loggers of a run: TensorBoard's comes first and gives the run its folder, any others follow."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from zolightning.checkpoints.resume import folder_settings
from zolightning.commands.options import LOGS, TENSORBOARD


def put_tensorboard_first(config: Namespace) -> None:
    """Adds TensorBoard's logger to others that a command names.

    Without it a run would have no folder of its own: that of Weights & Biases, for one, is the same for all runs. A run
    without loggers (``--trainer.logger false``) stays without.
    """
    loggers = _loggers(config)
    if not loggers:
        return
    boards = [logger for logger in loggers if folder_settings(logger) is not None]
    added = Namespace(class_path=TENSORBOARD["class_path"], init_args=Namespace(name=None, **TENSORBOARD["init_args"]))
    first = boards[0] if boards else added
    others = [logger for logger in loggers if logger is not first]
    config.trainer.logger = [first, *others] if others else first


def name_run(config: Namespace) -> None:
    """Names a run after its config files, unless it has a name: ``logs/sst2-mezo/version_0``.

    The folder is that of ``trainer.default_root_dir`` unless the logger has one of its own. Loggers besides
    TensorBoard's get its name; a CSVLogger, whose versions would be taken for other runs, a folder ``csv`` below it.
    """
    stems = [Path(str(path)).stem for path in config.get("config") or []]
    name = "-".join(stems) or "run"
    for logger in _loggers(config):
        settings = logger.get("init_args", Namespace())
        if settings.get("save_dir") == LOGS and config.trainer.default_root_dir is not None:
            settings.save_dir = str(config.trainer.default_root_dir)
        if str(settings.get("save_dir")).startswith("~"):
            # otherwise the curves would be in the home folder, and the checkpoints in a folder named `~`
            settings.save_dir = str(Path(settings.save_dir).expanduser())
        if "name" in settings and settings.name in (None, "lightning_logs"):
            settings.name = f"{name}/csv" if logger.class_path.endswith("CSVLogger") else name
        if folder_settings(logger) is not None:
            name = settings.name


def renamed(logger: Any, old: str, new: str) -> Any:
    """A run's loggers as plain values, for the run `new` in place of the run `old`; its folder is its first version."""
    if isinstance(logger, list):
        return [renamed(each, old, new) for each in logger]
    settings: Mapping[str, Any] = logger.get("init_args", {})
    changed: dict[str, Any] = {"name": str(settings["name"]).replace(old, new, 1)} if settings.get("name") else {}
    changed |= {"version": 0} if folder_settings(logger) is not None else {}
    return logger | {"init_args": {**settings, **changed}}


def _loggers(config: Namespace) -> list[Namespace]:
    """Those that a command names; none where it leaves the choice to Lightning, or wants none."""
    logger = config.trainer.logger
    return [each for each in (logger if isinstance(logger, list) else [logger]) if isinstance(each, Namespace)]
