"""The file of ``learn``: validations and tests of all runs, a line each; and what they say, in tables and curves."""

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean
from typing import Literal

from jsonargparse import Namespace
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zolightning.bench.figures import append
from zolightning.commands.tables import Record, print_table

Unit = Literal["forwards", "seconds"]


@dataclass(frozen=True)
class Key:
    """Identifies a run."""

    setting: str  # short hash of everything else that the run depends on
    task: str
    entry: str
    lr: float
    seed: int  # seed of the sampled rows, their order and the directions


@dataclass(frozen=True)
class Line:
    """An evaluation of a run."""

    split: str  # "val", "test", or "diverged" where a training loss was not finite and nothing was evaluated
    step: int  # number of steps before it
    forwards: int  # forwards that those steps took. A backward counts as two
    seconds: float  # seconds that they took, without validations
    loss: float
    accuracy: float

    def spent(self, unit: Unit) -> float:
        """Forwards, or seconds, before the evaluation."""
        return self.forwards if unit == "forwards" else self.seconds


@dataclass
class Curve:
    """All evaluations of a run."""

    validated: dict[int, Line] = field(default_factory=dict)  # validations by step
    # tests of the best weights within each limit, by step; only a finished run has them
    tested: dict[int, Line] = field(default_factory=dict)
    has_diverged: bool = False  # whether a training loss was not finite

    def within(self, unit: Unit, limit: float) -> list[Line]:
        """Validations before a limit is passed."""
        return [line for _, line in sorted(self.validated.items()) if line.spent(unit) <= limit]

    def best(self, unit: Unit, limit: float) -> Line:
        """The validation with the least loss within a limit."""
        return min(self.within(unit, limit), key=lambda line: math.inf if math.isnan(line.loss) else line.loss)

    def test(self, unit: Unit, limit: float) -> Line | None:
        """The test of :meth:`best`; None where there has been none."""
        return self.tested.get(self.best(unit, limit).step)

    def add(self, line: Line) -> None:
        """Adds a line of the file. A resumed run repeats validations: the old ones from this step on are replaced."""
        if line.split == "diverged":
            self.has_diverged = True
        elif line.split == "test":
            self.tested[line.step] = line
        else:
            self.validated = {step: old for step, old in self.validated.items() if step < line.step}
            self.validated[line.step] = line


@dataclass(frozen=True)
class Entry:
    """One of the configurations that are compared."""

    name: str  # its name in tables
    config: Namespace  # configuration of all its runs, with the learning rate that its files give
    keys: tuple[Key, ...]  # the runs of its learning-rate grid

    def finished(self, curves: Mapping[Key, Curve]) -> list[Key]:
        """The finished runs of the grid."""
        return [key for key in self.keys if key in curves and curves[key].tested]

    def best(self, curves: Mapping[Key, Curve], unit: Unit, limit: float) -> Key | None:
        """The finished run of the grid with the least validation loss within a limit."""
        return min(self.finished(curves), key=lambda key: curves[key].best(unit, limit).loss, default=None)


Curves = Mapping[Key, Curve]
COLUMNS = tuple(column.name for cls in (Key, Line) for column in fields(cls))


def write(path: Path, key: Key, *lines: Line) -> None:
    """Appends lines of a run."""
    append(path, COLUMNS, [asdict(key) | asdict(line) for line in lines])


def read(path: Path) -> dict[Key, Curve]:
    """All runs of a file; none where there is none."""
    curves: dict[Key, Curve] = defaultdict(Curve)
    if not path.exists():
        return curves
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key = Key(row["setting"], row["task"], row["entry"], float(row["lr"]), int(row["seed"]))
            step, forwards, seconds = int(row["step"]), int(row["forwards"]), float(row["seconds"])
            line = Line(row["split"], step, forwards, seconds, float(row["loss"]), float(row["accuracy"]))
            curves[key].add(line)
    return curves


def print_tables(entries: Sequence[Entry], curves: Curves, limits: Mapping[Unit, float]) -> None:
    """Prints a table for each limit: all entries, each with its best learning rate, and a value for each seed."""
    for unit, limit in limits.items():
        records = [_record(one, curves, unit, limit) for one in entries]
        print_table(f"after {limit:g} {unit} of training", records)
    for one in entries:
        for unit, limit in limits.items():
            best, rates = one.best(curves, unit, limit), sorted(key.lr for key in one.keys)
            if best is not None and len(rates) > 1 and best.lr in (rates[0], rates[-1]):
                end = "smallest" if best.lr == rates[0] else "largest"
                print(f"{one.name}: lr {best.lr:g}, best by {unit}, is the {end} of its grid; another may be better.")


def draw(path: Path, entries: Sequence[Entry], curves: Curves, limits: Mapping[Unit, float]) -> None:
    """Draws validation loss and accuracy over forwards and over time, a line a run at an entry's best learning rate.

    Nothing is drawn where no run has been finished.
    """
    unit, limit = next(iter(limits.items()))
    if not any(one.best(curves, unit, limit) for one in entries):
        return
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for number, one in enumerate(entries):
        best = one.best(curves, unit, limit)
        for place, key in enumerate([] if best is None else _seeds(best, curves)):
            lines = list(curves[key].validated.values())
            for row, quantity in enumerate(("loss", "accuracy")):
                for column, spent in enumerate(("forwards", "seconds")):
                    xs, ys = [getattr(line, spent) for line in lines], [getattr(line, quantity) for line in lines]
                    label = f"{one.name}, lr {key.lr:g}" if place == 0 else None
                    panels[row, column].plot(xs, ys, color=f"C{number}", marker=".", linewidth=1.2, label=label)
    for row, quantity in enumerate(("val/loss", "val/accuracy")):
        panels[row, 0].set_ylabel(quantity)
    for column, spent in enumerate(("forwards (a backward counts as two)", "seconds of training")):
        panels[1, column].set_xlabel(spent)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    print(f"\ncurves: {path}")


def _seeds(best: Key, curves: Curves) -> list[Key]:
    """`best`, and the finished runs that differ from it in their seed only."""
    others = [key for key in curves if key != best and curves[key].tested and _unseeded(key) == _unseeded(best)]
    return [best, *others]


def _unseeded(key: Key) -> tuple[str, str, str, float]:
    return key.setting, key.task, key.entry, key.lr


def _record(one: Entry, curves: Curves, unit: Unit, limit: float) -> Record:
    tried = f"{len(one.finished(curves))} of {len(one.keys)}"
    columns = ("val/loss", "val/accuracy", "test/accuracy", "forwards", "seconds")
    best = one.best(curves, unit, limit)
    if best is None:
        return {"entry": one.name, "tried": tried, "lr": None, **dict.fromkeys(columns)}
    runs = [curves[key] for key in _seeds(best, curves)]
    lines = [run.best(unit, limit) for run in runs]
    tests = [run.test(unit, limit) for run in runs]
    ends = [run.within(unit, limit)[-1] for run in runs]
    return {
        "entry": one.name + (", diverged" if any(run.has_diverged for run in runs) else ""),
        "tried": tried,
        "lr": f"{best.lr:g}",
        "val/loss": ", ".join(f"{line.loss:.3f}" for line in lines),
        "val/accuracy": ", ".join(f"{100 * line.accuracy:.1f}" for line in lines),
        "test/accuracy": ", ".join("-" if test is None else f"{100 * test.accuracy:.1f}" for test in tests),
        "forwards": round(mean(end.forwards for end in ends)),
        "seconds": round(mean(end.seconds for end in ends)),
    }
