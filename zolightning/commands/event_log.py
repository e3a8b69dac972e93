"""Reads TensorBoard's event files of a run as curves, while it writes them or later."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

from zolightning.checkpoints.run_logs import OVERVIEW

_END = "_hparams_/session_end_info"  # written by RunOverview when training ends
_SHOWN_OTHERWISE = ("best/", "by_forward_passes/", "hp_metric", "epoch", "zo/forward_passes")


@dataclass(frozen=True)
class Point:
    """A value of a metric, with the steps, forward passes and time that had been spent when it was logged."""

    step: int  # steps that had been taken; 0 is before training
    forward_passes: int | None  # forward passes of training so far; None if backpropagation trains
    # time since the fit began, with probes before its first step and validations, without pauses between a stop and a
    # resumption
    seconds: float
    value: float  # the value of the metric


def event_files(folder: Path) -> list[Path]:
    """The event files of a folder, in the order in which they were begun, if no clock was set back in between.

    Their names end with the second, the host, the process and the number of the file in its process. Numbers are
    compared as numbers: one process may begin its ninth and its tenth file within a second.
    """
    return sorted(
        folder.glob("events.out.tfevents.*"),
        key=lambda file: [int(part) for part in file.name.split(".") if part.isdigit()],
    )


class EventLog:
    """The event files of a folder, which a run may be writing. :meth:`read` goes on where it stopped.

    A step that was logged twice counts once, by its latest value.

    Attributes:
        overviews: RunOverview's texts by their titles, from the start of the run and from each resumption.
        test: metrics of the run's test, if there was one.
        ended: whether training has ended.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.overviews: list[dict[str, str]] = []
        self.test: dict[str, float] = {}
        self.ended = False
        self._loaders: dict[Path, EventFileLoader] = {}
        self._values: dict[str, dict[int, tuple[float, float]]] = {}  # by metric and step: seconds and value
        self._forward_passes: dict[int, int] = {}  # by step
        # Seconds of training until the run last stopped; when it last started; the latest.
        self._before = self._started = self._now = 0.0
        self._step = 0

    def read(self) -> None:
        """Reads what was written since the last time."""
        for event, value in self._summaries():
            if value.tag == OVERVIEW:
                self._before += self._now - self._started
                self._started = self._now = event.wall_time
                self.overviews.append(_overview(make_ndarray(value.tensor).item().decode()))
                self.ended = False
            self.ended = self.ended or value.tag == _END
            if value.metadata.plugin_data.plugin_name == "scalars":
                self._take(event, value.tag, make_ndarray(value.tensor).item())

    @property
    def curves(self) -> dict[str, list[Point]]:
        """By metric, in the order of steps; forward passes between two steps that have logged them are interpolated."""
        return {metric: _curve(values, self._forward_passes) for metric, values in self._values.items()}

    def _summaries(self) -> Iterator[tuple[Any, Any]]:
        for file in event_files(self.folder):
            if file not in self._loaders:
                self._loaders[file] = EventFileLoader(str(file))
            for event in self._loaders[file].Load():
                for value in event.summary.value:
                    yield event, value

    def _take(self, event: Any, tag: str, number: float) -> None:
        if tag.startswith("test"):
            self.test[tag] = number
        elif tag.startswith("by_forward_passes/"):  # follows the metrics of its validation
            self._forward_passes[self._step] = event.step
        elif tag == "zo/forward_passes":
            self._forward_passes[event.step + 1] = int(number)
        if tag.startswith(("test", *_SHOWN_OTHERWISE)):
            return
        # Lightning counts from 0 what it logs after a step, and so the validation before the first one.
        self._step, seconds = 0, 0.0
        if self.overviews:
            self._now = event.wall_time
            self._step, seconds = event.step + 1, self._before + self._now - self._started
        self._values.setdefault(tag, {})[self._step] = seconds, number


def _curve(values: Mapping[int, tuple[float, float]], forward_passes: Mapping[int, int]) -> list[Point]:
    steps = sorted(values)
    known = sorted({0: 0, **forward_passes}.items())
    passes = np.interp(steps, [step for step, _ in known], [count for _, count in known]).round()
    return [
        Point(step, int(count) if forward_passes else None, *values[step])
        for step, count in zip(steps, passes, strict=True)
    ]


def _overview(table: str) -> dict[str, str]:
    """Lines of RunOverview's table in Markdown, ``| name | value |``, by name."""
    rows = (line[2:-2].partition(" | ") for line in table.split("\n")[2:])
    return {name: value for name, _, value in rows}
