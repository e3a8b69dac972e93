"""Files of a measurement."""

import csv
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from zolightning.commands.report import Record


def write_csv(path: Path, tables: Mapping[str, Sequence[Record]], context: Record) -> None:
    """Writes all tables to one file: a line has the name of its table, its record, and the context."""
    lines = [{"table": table, **record, **context} for table, records in tables.items() for record in records]
    columns = [column for column in dict.fromkeys(key for line in lines for key in line) if column not in context]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *context], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def machine() -> dict[str, str | int]:
    """What figures depend on beside the arguments."""
    return {"torch": torch.__version__, "cpu": _cpu_name(), "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
