"""Tables on the screen and in a file."""

import csv
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

Record = Mapping[str, str | int | float | None]


def print_table(title: str, records: Sequence[Record]) -> None:
    """Prints records that have the same keys, which head the columns."""
    lines = [list(records[0]), *([_text(value) for value in record.values()] for record in records)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


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


def _text(value: str | int | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
