"""Checks of arguments: numbers, choices and patterns. Each raises a ValueError: name, value and what is accepted."""

import math
import re
from collections.abc import Sequence
from numbers import Integral
from typing import SupportsFloat


def require_positive(name: str, value: object) -> None:
    """Refuses all but finite numbers above zero."""
    if not (isinstance(value, SupportsFloat) and math.isfinite(value) and float(value) > 0):
        raise ValueError(f"`{name}` must be a positive number, got {value!r}.")


def require_fraction(name: str, value: float) -> None:
    """Refuses numbers outside of [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must be at least 0 and below 1, got {value!r}.")


def require_share(name: str, value: float) -> None:
    """Refuses numbers outside of (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"`{name}` must be above 0 and at most 1, got {value!r}.")


def require_integer(name: str, value: object, least: int = 1) -> None:
    """Refuses all but integers that are at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an integer, at least {least}, got {value!r}.")


def require_seed(seed: int) -> None:
    """Refuses all but integers of at most 64 bits."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"`seed` must be an integer of at most 64 bits, got {seed!r}.")


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuses all but the `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")


def require_patterns(patterns: Sequence[str]) -> None:
    """Refuses all but regular expressions, one at least."""
    if isinstance(patterns, str) or not patterns:
        raise ValueError(f"`patterns` must be a list of at least one regular expression, got {patterns!r}.")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`patterns` has '{pattern}', which is not a regular expression: {error}.") from None
