"""Reads the folder of a run: its settings, its curves, how far it has come."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from zolightning.checkpoints.ledger import DamagedLedgerError, Ledger
from zolightning.commands.event_log import EventLog, Point
from zolightning.messages import some
from zolightning.rank_zero import rank_zero_warn

# Settings of where a run's files go, in which all runs differ
PLACES = ("trainer.default_root_dir", "trainer.logger", "checkpoint.dirpath", "save_last.dirpath")
_LOG_EVERY = 50  # steps, Lightning's default


@dataclass(frozen=True)
class Run:
    """A run that trains or has trained."""

    folder: Path  # the folder of the run
    config: dict[str, Any]  # the settings in its ``config.yaml``
    overview: dict[str, str]  # RunOverview's texts by their titles: ``method``, ``scope``, ``memory`` and others
    commands: list[str]  # the commands that started and resumed it
    curves: dict[str, list[Point]]  # the values of each metric, in the order of steps
    test: dict[str, float]  # metrics of its test, if there was one
    step: int  # how many steps have been taken
    # ``finished`` (it has taken ``max_steps``), ``running``, ``ended`` (before these, by a callback, a signal, epochs
    # or time), ``interrupted``, or ``not finished`` where a run without a ledger does not show whether it still runs
    state: str

    @property
    def monitor(self) -> str | None:
        """The metric by which the best checkpoint is chosen."""
        name: str | None = (self.config.get("checkpoint") or {}).get("monitor")
        return name

    @property
    def metrics(self) -> list[str]:
        """Names of what its validations measure, the monitored one first."""
        names = [name for name in self.curves if name.startswith("val")]
        return sorted(names, key=lambda name: name != self.monitor)

    @property
    def best(self) -> Point | None:
        """The validation with the best value of the monitored metric, the first of equal ones; None before any."""
        points = [p for p in self.curves.get(self.monitor or "", []) if p.step > 0 and not np.isnan(p.value)]
        choose = min if (self.config.get("checkpoint") or {}).get("mode") == "min" else max
        return choose(points, key=lambda point: point.value, default=None)

    @property
    def best_checkpoint(self) -> Path | None:
        """The file of :attr:`best`, as long as it exists and its name has the step."""
        dirpath = (self.config.get("checkpoint") or {}).get("dirpath")
        folder = self.folder / "checkpoints" if dirpath is None else Path(dirpath)
        for path in sorted(folder.glob("*.ckpt")):
            found = re.search(r"step=(\d+)", path.stem)
            if found and self.best is not None and int(found[1]) == self.best.step:
                return path
        return None

    def at(self, metric: str, step: int) -> float | None:
        """The value of a metric after a step, if one was logged."""
        return next((point.value for point in self.curves.get(metric, []) if point.step == step), None)

    @property
    def peak_memory_gib(self) -> float | None:
        """The most memory that RunMonitor has logged."""
        return max((point.value for point in self.curves.get("run/peak_memory_gib", [])), default=None)

    @property
    def spent(self) -> Point:
        """Step, forward passes and seconds at the latest value of any metric."""
        return max((points[-1] for points in self.curves.values()), key=lambda point: (point.step, point.seconds))


def read_run(folder: Path) -> Run:
    """The run of a folder.

    Raises:
        ValueError: if it is not that of a run, or the run has not logged anything of its training.
    """
    if not (folder / "config.yaml").is_file():
        below = [str(path.parent) for path in sorted(folder.rglob("config.yaml"))]
        hint = f" Name those below it: {some(below)}." if below else ""
        raise ValueError(
            f"{folder} is not the folder of a run: it has no config.yaml, which `zolightning fit` writes there.{hint}"
        )
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / 'config.yaml'} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.yaml'} holds no settings: it is empty or truncated.")
    log = EventLog(folder)
    log.read()
    curves = log.curves
    if not log.overviews or not any(point.step for points in curves.values() for point in points):
        raise ValueError(
            f"{folder} has no curve of a training yet: its event files (events.out.tfevents.*) hold no step. A run "
            "writes to them every `trainer.log_every_n_steps` steps."
        )
    logged = max(points[-1].step for points in curves.values())
    step, state = _progress(folder, config, logged, log.ended)
    every = (config.get("trainer") or {}).get("log_every_n_steps") or _LOG_EVERY
    if state == "finished" and step - logged >= every:
        rank_zero_warn(
            f"The curves of {folder} end at step {logged}, and the run took {step} steps: an event file "
            "(events.out.tfevents.*) is truncated or missing."
        )
    return run_of(log, config, step, state)


def run_of(log: EventLog, config: dict[str, Any], step: int, state: str) -> Run:
    """The run whose event files `log` has read."""
    overviews = [dict(overview) for overview in log.overviews]
    commands = [overview.pop("command") for overview in overviews if "command" in overview]
    overview = overviews[-1] if overviews else {}
    return Run(log.folder, config, overview, list(dict.fromkeys(commands)), log.curves, log.test, step, state)


def _progress(folder: Path, config: Mapping[str, Any], logged: int, ended: bool) -> tuple[int, str]:
    """Steps that have been taken, and the state; the ledger knows both to the step, the curves do not."""
    ledger, step = None, logged
    files = sorted(folder.glob("ledger*.bin"), key=lambda path: path.stat().st_mtime)
    try:
        ledger = Ledger(files[-1]) if files else None
    except (DamagedLedgerError, ValueError) as error:
        rank_zero_warn(f"{error} The run's progress is read from its curves.")
    if ledger is not None:
        step = max(logged, ledger.header.first_step + len(ledger))
    if 0 < max_steps(config) <= step:
        return step, "finished"
    if ledger is not None and ledger.is_written():
        return step, "running"
    return step, "ended" if ended else "not finished" if ledger is None else "interrupted"


def max_steps(config: Mapping[str, Any]) -> int:
    """The steps that a run is to take; -1 where epochs or time end it."""
    return (config.get("trainer") or {}).get("max_steps") or -1
