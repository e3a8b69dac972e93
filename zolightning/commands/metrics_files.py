"""``metrics.json`` and ``curves.csv`` in the folder of a run: its metrics, for programs to read."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from zolightning.checkpoints.checkpoint_io import remove_unfinished, replace_text
from zolightning.commands.event_log import EventLog
from zolightning.commands.run_folder import Run, run_of
from zolightning.partners import tensorboards
from zolightning.rank_zero import rank_zero_warn
from zolightning.versions import installed_version

METRICS, CURVES = "metrics.json", "curves.csv"
_LIBRARIES = ("zolightning", "torch", "lightning", "transformers")


class MetricsFiles(Callback):
    """Writes what a run has measured to files beside its ``config.yaml``, on the first rank.

    * ``metrics.json``: for ``fit`` its state, steps, forward passes, seconds and peak memory, the metrics before
      training, at the best and at the last validation, and those of a test; for ``validate`` and ``test`` the metrics
      and the checkpoint; the commands, and the versions of libraries.
    * ``curves.csv``, of a training: every value of every metric.

    Both are written as a whole at the end of each validation, of the training and of a test, and where these are cut
    short by an error or a signal. They say what TensorBoard's event files in the folder say, and so have each step
    once, however often the run was stopped; without TensorBoard's logger nothing is written.
    """

    def __init__(self, subcommand: str, command: str, checkpoint: str | None = None) -> None:
        self.subcommand, self.command, self.checkpoint = subcommand, command, checkpoint
        self._log: EventLog | None = None  # of the first rank, if TensorBoard's logger writes
        self._state = "running"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = trainer.log_dir  # a broadcast: on every rank
        is_local = folder is not None and "://" not in folder
        if is_local and self._log is None and tensorboards(trainer):
            self._log = EventLog(Path(str(folder)))
            remove_unfinished(self._log.folder)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._write(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._state = "finished" if 0 < trainer.max_steps <= trainer.global_step else "ended"
        self._write(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._state = "interrupted"
            self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        if self._log is None:
            return
        folder = self._log.folder
        try:
            for logger in tensorboards(trainer):
                logger.experiment.flush()
            if self.subcommand != "fit":
                replace_text(folder / METRICS, as_json(self._evaluated(trainer) | {"versions": library_versions()}))
                return
            self._log.read()
            run = run_of(self._log, dict(getattr(trainer, "run_config", {})), trainer.global_step, self._state)
            if run.curves:
                replace_text(folder / METRICS, as_json(run_metrics(run) | {"versions": library_versions()}))
                replace_text(folder / CURVES, curves_csv([run]))
        except OSError as error:  # a full disk, for one: the run goes on
            rank_zero_warn(f"{METRICS} and {CURVES} of {folder} are not up to date: {error}")

    def _evaluated(self, trainer: L.Trainer) -> dict[str, Any]:
        of, state = ("test", "tested") if self.subcommand == "test" else ("validation", "validated")
        measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return {"state": state, of: measured, "checkpoint": self.checkpoint, "commands": [self.command]}


def run_metrics(run: Run) -> dict[str, Any]:
    """The metrics of a training, as plain values."""
    return {
        "folder": str(run.folder),
        "state": run.state,
        "step": run.step,
        "forward_passes": run.spent.forward_passes,
        "seconds": run.spent.seconds,
        "peak_memory_gib": run.peak_memory_gib,
        "monitor": run.monitor,
        "before_training": {name: run.at(name, 0) for name in run.metrics},
        "best": run.best and {"step": run.best.step, **{m: run.at(m, run.best.step) for m in run.metrics}},
        "best_checkpoint": run.best_checkpoint and str(run.best_checkpoint),
        "last": {name: run.curves[name][-1].value for name in run.metrics},
        "test": run.test,
        "overview": run.overview,
        "commands": run.commands,
    }


def curves_csv(runs: Sequence[Run]) -> str:
    """A line for each value of each metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "metric", "step", "forward_passes", "seconds", "value"])
    for run in runs:
        for metric, points in run.curves.items():
            for point in points:
                row = [point.step, point.forward_passes, f"{point.seconds:.3f}", f"{point.value:.7g}"]
                writer.writerow([run.folder, metric, *row])
    return text.getvalue()


def as_json(value: Any) -> str:
    """The text of a file, with null in the place of NaN and infinities, which JSON does not have."""
    return json.dumps(_finite(value), indent=2) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def library_versions() -> dict[str, str]:
    """The installed versions of the libraries on which results depend, by name."""
    return {library: found for library in _LIBRARIES if (found := installed_version(library)) is not None}
