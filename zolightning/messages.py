"""Helpers for the texts of messages."""

from collections.abc import Mapping, Sequence


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: 1 step, 2 steps, 1 class, 2 classes (whose plural is given)."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def differing(one: Mapping[str, Sequence[int]], other: Mapping[str, Sequence[int]]) -> str:
    """How two sets of weights differ, given their shapes by name; empty if they do not."""
    names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    have = "weights have other names or shapes, or are missing there or here"
    return f"{len(names)} {have} ({some(names)})" if names else ""


def some(names: Sequence[str]) -> str:
    """The first five of many names, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def aligned(texts: Mapping[str, str]) -> str:
    """Titles and their texts in two columns, a line each."""
    width = max(map(len, texts))
    return "\n".join(f"{title:{width}}  {text}" for title, text in texts.items())


def in_units(number: int) -> str:
    """A number of bytes in larger units: ``16.1 GB``, ``56.6 MB``."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def rough_duration(seconds: float) -> str:
    """A duration that is known roughly: ``90 s``, ``45 min``, ``2.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
