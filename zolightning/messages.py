"""Helpers for the texts of messages."""

from collections.abc import Sequence


def some(names: Sequence[str]) -> str:
    """The first five of many names, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
