"""Figures that are kept one by one, so that a run which ends early loses none."""

import csv
from pathlib import Path

COLUMNS = ("part", "name", "figure", "value")


class Figures:
    """Appends to a CSV file, a line a figure, and prints; processes may take turns with one file.

    Args:
        path: of the file; made, with its head, where there is none.
        part: of the run that the figures belong to.
    """

    def __init__(self, path: Path, part: str) -> None:
        self.path = path
        self.part = part

    def write(self, name: str, **figures: str | float | None) -> None:
        """Appends the figures of `name`; those that are None are left out."""
        pairs = [(figure, value) for figure, value in figures.items() if value is not None]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:  # closed, so that the lines are on their way to the disk
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([COLUMNS] if is_new else [])
            writer.writerows((self.part, name, *pair) for pair in pairs)
        texts = [
            f"{figure} {value:.4g}" if isinstance(value, float) else f"{figure} {value}" for figure, value in pairs
        ]
        print(f"{self.part} | {name}: {', '.join(texts)}", flush=True)
