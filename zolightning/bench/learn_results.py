"""The file of ``learn``: validations and tests of all runs, a line each, and what they say."""

import csv
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from zolightning.bench.figures import append

if TYPE_CHECKING:
    from jsonargparse import Namespace

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
    config: "Namespace"  # configuration of all its runs, with the learning rate that its files give
    keys: tuple[Key, ...]  # the runs of its learning-rate grid

    def finished(self, curves: Mapping[Key, Curve]) -> list[Key]:
        """The finished runs of the grid."""
        return [key for key in self.keys if key in curves and curves[key].tested]

    def best(self, curves: Mapping[Key, Curve], unit: Unit, limit: float) -> Key | None:
        """The finished run of the grid with the least validation loss within a limit."""
        return min(self.finished(curves), key=lambda key: curves[key].best(unit, limit).loss, default=None)


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
