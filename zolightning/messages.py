"""Helpers for the texts of messages."""

from collections.abc import Sequence


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: 1 step, 2 steps, 1 class, 2 classes (whose plural is given)."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def some(names: Sequence[str]) -> str:
    """The first five of many names, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
