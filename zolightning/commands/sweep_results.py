"""The results of a sweep, in a file that grows by one line a layer and survives interruptions."""

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zolightning.checkpoints.checkpoint_io import replace_text

ZERO_SHOT = "zero-shot"
_COLUMNS = ("layer", "parameters", "steps", "seconds")


@dataclass(frozen=True)
class SweepRow:
    """A line of the file.

    Attributes:
        layer: index of the layer as text, or "zero-shot".
        parameters: number of parameters that were trained.
        steps: number of steps.
        seconds: duration of the training.
        metrics: metrics of the evaluation afterwards; all None if training diverged.
    """

    layer: str
    parameters: int
    steps: int
    seconds: float
    metrics: dict[str, float | None]


class SweepResults:
    """``results.csv`` and, beside it, ``settings.json`` with what its lines depend on.

    Args:
        folder: the folder of both files; results that are already there are read.
        settings: the settings of this sweep, compared with those in the folder.

    Raises:
        ValueError: if the folder holds results of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder / "results.csv"
        self.rows: dict[str, SweepRow] = {}
        self._keep_settings(folder / "settings.json", json.loads(json.dumps(settings)))
        if self.path.exists():
            self._read()

    @property
    def metric_names(self) -> list[str]:
        """The metrics of every line, those of the first one."""
        return list(self.rows[ZERO_SHOT].metrics)

    def append(self, row: SweepRow) -> None:
        """Adds a line with one write, so that a kill leaves a whole file; the first row decides the metrics."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not self.rows:
            writer.writerow([*_COLUMNS, *row.metrics])
        self.rows[row.layer] = row
        metrics = [row.metrics[name] for name in self.metric_names]
        writer.writerow([row.layer, row.parameters, row.steps, f"{row.seconds:.3f}", *metrics])
        with self.path.open("ab", buffering=0) as file:
            file.write(text.getvalue().encode())
            os.fsync(file.fileno())

    def layers(self) -> list[SweepRow]:
        """The rows of layers, in the order of the layers."""
        rows = [row for row in self.rows.values() if row.layer != ZERO_SHOT]
        return sorted(rows, key=lambda row: int(row.layer))

    def _keep_settings(self, path: Path, settings: dict[str, Any]) -> None:
        if not path.exists():
            if self.path.exists():
                raise ValueError(
                    f"`output` is {path.parent}, whose results.csv has no settings.json beside it that says where it "
                    "comes from. Name another folder."
                )
            replace_text(path, json.dumps(settings, indent=2) + "\n")
            return
        there, here = (dict(flat(s)) for s in (json.loads(path.read_text()), settings))
        changed = [key for key in there | here if there.get(key) != here.get(key)]
        if changed:
            shown = "; ".join(f"`{key}` {there.get(key)!r} there, {here.get(key)!r} now" for key in changed[:5])
            raise ValueError(
                f"`output` is {path.parent}, which holds results of other settings: {shown}. Name another folder, "
                "or repeat the settings."
            )

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # the machine went down in the middle of a line
            os.truncate(self.path, len(whole))
        for line in csv.DictReader(io.StringIO(whole.decode())):
            row = SweepRow(
                layer=line.pop("layer"),
                parameters=int(line.pop("parameters")),
                steps=int(line.pop("steps")),
                seconds=float(line.pop("seconds")),
                metrics={name: float(value) if value else None for name, value in line.items()},
            )
            self.rows[row.layer] = row


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries and lists, by dotted name."""
    if isinstance(value, Mapping) and value:
        items: Any = value.items()
    elif isinstance(value, list) and value:
        items = enumerate(value)
    else:
        yield prefix, value
        return
    for key, inner in items:
        yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
