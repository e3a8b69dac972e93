"""The results of a sweep, in a file that has one line more after each layer and survives interruptions."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zolightning.checkpoints.checkpoint_io import remove_unfinished, replace_text

ZERO_SHOT = "zero-shot"
_COLUMNS = ("layer", "parameters", "steps", "seconds")


@dataclass(frozen=True)
class SweepRow:
    """A line of the file."""

    layer: str  # its index, or "zero-shot"
    parameters: int  # how many were trained
    steps: int
    seconds: float  # of the training
    metrics: dict[str, float | None]  # of the evaluation afterwards; all None if training diverged


class SweepResults:
    """``results.csv`` and, beside it, ``settings.json`` with what its lines depend on.

    Raises:
        ValueError: if the folder holds results of different settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder / "results.csv"
        self.rows: dict[str, SweepRow] = {}
        remove_unfinished(folder)
        self._keep_settings(folder / "settings.json", json.loads(json.dumps(settings)))
        if self.path.exists():
            for line in csv.DictReader(self.path.read_text().splitlines()):
                layer, parameters, steps, seconds = (line.pop(column) for column in _COLUMNS)
                metrics = {name: float(value) if value else None for name, value in line.items()}
                self.rows[layer] = SweepRow(layer, int(parameters), int(steps), float(seconds), metrics)

    @property
    def metric_names(self) -> list[str]:
        """The metrics of every line, those of the first one."""
        return list(next(iter(self.rows.values())).metrics)

    def append(self, row: SweepRow) -> None:
        """Adds a line and writes the file again, so that it is whole even if the process is killed meanwhile."""
        self.rows[row.layer] = row
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*_COLUMNS, *self.metric_names])
        for each in self.rows.values():
            metrics = [each.metrics[name] for name in self.metric_names]
            writer.writerow([each.layer, each.parameters, each.steps, f"{each.seconds:.3f}", *metrics])
        replace_text(self.path, text.getvalue())

    def layers(self) -> list[SweepRow]:
        """The rows of layers, in the order of the layers."""
        rows = [row for row in self.rows.values() if row.layer != ZERO_SHOT]
        return sorted(rows, key=lambda row: int(row.layer))

    def _keep_settings(self, path: Path, settings: dict[str, Any]) -> None:
        if not path.exists():
            if self.path.exists():
                raise ValueError(
                    f"`output` is {path.parent}, whose results.csv has no settings.json next to it that says where it "
                    "comes from. Name another folder."
                )
            replace_text(path, json.dumps(settings, indent=2) + "\n")
            return
        there, here = (dict(flat(s)) for s in (json.loads(path.read_text()), settings))
        changed = [key for key in there | here if there.get(key) != here.get(key)]
        if changed:
            shown = "; ".join(f"`{key}` is {here.get(key)!r}, was {there.get(key)!r}" for key in changed[:5])
            raise ValueError(
                f"`output` is {path.parent}, which holds results of different settings: {shown}. Name another folder, "
                "or repeat the settings."
            )


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries and lists, by dotted name."""
    if isinstance(value, Mapping | list) and value:
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
