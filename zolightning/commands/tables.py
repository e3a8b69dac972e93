"""Tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]  # of texts, numbers and None


def print_table(title: str, records: Sequence[Record]) -> None:
    """Prints records that have the same keys, which head the columns."""
    lines = [list(records[0]), *([_text(value) for value in record.values()] for record in records)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def _text(value: str | int | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return str(value)
