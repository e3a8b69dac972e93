"""Functions of torch that describe a tensor, and do not read its values."""

from collections.abc import Callable
from typing import Any

# Getters that return a tensor that holds the parameter's values; all others (shape, dtype, ...) only describe it.
_VALUE_GETTERS = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
_DESCRIPTIONS = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_contiguous", "__len__"}
    | {"is_floating_point", "is_complex", "__hash__", "get_device", "storage_offset"}
)


def describes(func: Callable[..., Any]) -> bool:
    """Whether a function that is handed a tensor only describes it: its shape, its dtype, where it lies."""
    name = func.__name__
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", None) not in _VALUE_GETTERS
    return name in _DESCRIPTIONS
