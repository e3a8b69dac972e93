"""Keeps steps that are repeated after a resume from being logged twice."""

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger

from zolightning.partners import tensorboards

OVERVIEW = "run/text_summary"  # tag of what RunOverview writes when a fit begins


class Muted:
    """Replaces a Trainer's loggers by loggers that write nothing; `until` is the first step to be logged again."""

    def __init__(self, trainer: L.Trainer, until: int) -> None:
        self.until = until
        self._loggers: list[Logger] = trainer.loggers
        trainer.loggers = [DummyLogger() for _ in self._loggers]

    def end(self, trainer: L.Trainer) -> None:
        """Gives the Trainer its loggers back."""
        trainer.loggers = self._loggers


def not_yet_logged(trainer: L.Trainer) -> dict[str, float]:
    """The metrics that the step just taken will log when it is over; empty outside of ``on_train_batch_end``."""
    connector = trainer._logger_connector
    if connector._first_loop_iter is None or not connector.should_update_logs:  # None: between batches
        return {}
    return {"epoch": trainer.current_epoch, **convert_tensors_to_scalars(connector.metrics["log"])}


def log_once(trainer: L.Trainer, rest: dict[str, float] | None = None, begins_with_fit: bool = True) -> None:
    """Makes TensorBoard's loggers skip values of the last step and of later ones that are already in their folders.

    Such values were left by a process that was killed after it had logged a step or a validation and before it had
    completed it. `rest`, which :func:`not_yet_logged` found in the last step, is logged now if it has not been.

    A validation before a fit has the step of one after the first step: it counts unless what is logged from now on
    `begins_with_fit`.
    """
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    except ModuleNotFoundError:  # there is no such logger then
        return
    for logger in tensorboards(trainer):
        files = Path(logger.log_dir).glob("events.out.tfevents.*")
        events = [event for file in files for event in EventFileLoader(str(file)).Load()]
        fits = [event.wall_time for event in events if any(value.tag == OVERVIEW for value in event.summary.value)]
        began, last = min(fits, default=0.0) if begins_with_fit else 0.0, trainer.global_step - 1
        later = (event for event in events if event.step >= last and event.wall_time >= began)
        there: Counter[tuple[str, int | None]] = Counter(
            (value.tag, event.step) for event in later for value in event.summary.value
        )
        _leave_out(logger.experiment, there)
        if rest:
            logger.log_metrics(rest, last)
            logger.save()


def _leave_out(writer: Any, there: Counter[tuple[str, int | None]]) -> None:
    """Makes a writer skip each value as many times as it is there: two validations can have the same step."""
    file_writer = writer._get_file_writer()
    add_summary = file_writer.add_summary

    def add_new(summary: Any, global_step: int | None = None, walltime: float | None = None) -> None:
        values = [(value.tag, global_step) for value in summary.value]
        is_new = any(there[value] <= 0 for value in values)
        there.subtract(values)
        if is_new:
            add_summary(summary, global_step, walltime)

    file_writer.add_summary = add_new
