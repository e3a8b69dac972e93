"""CSV files of figures: written as a whole, or line by line, so that a run which ends early loses none."""

import csv
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from zolightning.commands.tables import Record

Value = str | float | None
COLUMNS = ("part", "name", "figure", "value")


def write_csv(path: Path, tables: Mapping[str, Sequence[Record]], context: Record) -> None:
    """Writes all tables to one file: a line has the name of its table, its record, and the context."""
    lines = [{"table": table, **record, **context} for table, records in tables.items() for record in records]
    columns = [column for column in dict.fromkeys(key for line in lines for key in line) if column not in context]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *context], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def append(path: Path, columns: Sequence[str], records: Sequence[Mapping[str, Value]]) -> None:
    """Appends records to a CSV file, which is made with a header if needed. Several processes may do so in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:  # closed at once: the lines outlive the process
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(records)


class Figures:
    """Writes figures, one line of a CSV file for each, and prints them."""

    def __init__(self, path: Path, part: str) -> None:
        self.path = path
        self.part = part

    def write(self, name: str, **figures: Value) -> None:
        """Appends the figures of `name`; those that are None are left out."""
        pairs = [(figure, value) for figure, value in figures.items() if value is not None]
        lines = [{"part": self.part, "name": name, "figure": figure, "value": value} for figure, value in pairs]
        append(self.path, COLUMNS, lines)
        texts = (
            f"{figure} {value:.4g}" if isinstance(value, float) else f"{figure} {value}" for figure, value in pairs
        )
        print(f"{self.part} | {name}: {', '.join(texts)}", flush=True)

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Catches an exception of the body, and writes its first line as the figure ``failed`` of `name`."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.write(name, failed=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
