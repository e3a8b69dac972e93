"""Tensors in nested containers: batches, arguments of a function, outputs of a network.

Lightning's ``apply_to_collection`` does much the same. The methods do without it, as they need PyTorch only.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def _shared(data: Any) -> Any:
    return data


def map_tensors(function: Callable[[Tensor], Any], data: Any, other: Callable[[Any], Any] = _shared) -> Any:
    """A copy of `data` with ``function(tensor)`` in place of each tensor.

    It descends into mappings, lists, deques, tuples (named ones too) and dataclasses (frozen ones too), which are
    copied. In place of other objects it has ``other(object)``: as a rule they are shared with `data`.
    """
    if isinstance(data, Tensor):
        return function(data)
    if is_dataclass(data) and not isinstance(data, type):  # before mappings: transformers' outputs are both
        return _mapped_dataclass(function, data, other)
    if isinstance(data, Mapping):
        found = {name: map_tensors(function, value, other) for name, value in data.items()}
        make: Any = type(data)
        return make(data.default_factory, found) if isinstance(data, defaultdict) else make(found)
    if isinstance(data, list | tuple | deque):
        members = [map_tensors(function, member, other) for member in data]
        make = type(data)
        return make(*members) if hasattr(data, "_fields") else make(members)
    return other(data)


def tensors_in(data: Any) -> list[Tensor]:
    """All tensors in nested containers, in order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, data)
    return found


def batch_size(batch: Any) -> int | None:
    """The length of the first tensor in a batch that has rows; 0 if none has any, and None if there is no tensor."""
    lengths = [len(tensor) for tensor in tensors_in(batch) if tensor.ndim]
    return next(filter(None, lengths), 0) if lengths else None


def _mapped_dataclass(function: Callable[[Tensor], Any], data: Any, other: Callable[[Any], Any]) -> Any:
    result: Any = copy(data)
    for field in fields(data):
        if not hasattr(data, field.name):
            continue
        value = map_tensors(function, getattr(data, field.name), other)
        if data.__dataclass_params__.frozen:
            object.__setattr__(result, field.name, value)
        else:
            setattr(result, field.name, value)
    return result
