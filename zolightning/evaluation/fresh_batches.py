"""Gives each evaluation of a step the batch as it was loaded, even if ``training_step`` changes the one it gets."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from zolightning.evaluation.nested import map_tensors


class FreshBatches:
    """Evaluates ``training_step`` on batches that none of its earlier calls has changed.

    It may write to a tensor of its batch (``x.div_(255)``), take an entry out of it (``batch.pop("labels")``) or
    replace one (``graph.x = ...``), which the next evaluation of the same step would miss. The first call of a fit gets
    a copy, which shows whether it does; if so, every call gets one. An object is changed if its attributes are; one
    that cannot be copied (a lock) is passed on as it is.
    """

    def __init__(self) -> None:
        self._copies: bool | None = None  # None before the first call

    def evaluate(self, training_step: Callable[[Any], Any], batch: Any) -> Any:
        """What ``training_step`` returns for a batch, which stays as it is.

        Raises:
            ValueError: if it changes its batch, and has not done so in the first call, or the batch has no copies.
        """
        given = batch if self._copies is False else copied(batch)
        own, before = list(_contents(batch)), list(_contents(given))
        output = training_step(given)
        if list(_contents(batch)) != own:
            why = "it did not do in the first step" if self._copies is False else "cannot be copied"
            raise ValueError(
                f"`training_step` has changed its batch in place, which {why}, but is evaluated several times on each "
                "batch. Let it change a copy: `x = x.clone()`, `batch = dict(batch)`."
            )
        if self._copies is None:
            self._copies = list(_contents(given)) != before
        return output


def copied(batch: Any) -> Any:
    """A batch with copies of all tensors in it, and of what holds them: containers and objects, a graph for one."""
    return map_tensors(Tensor.clone, batch, _copied_object)


def _copied_object(value: Any) -> Any:
    try:
        return deepcopy(value)
    except Exception:  # whatever a class says that has no copies
        return value


def _contents(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Shows whether a batch was changed: which objects it holds, and how often its tensors were written to.

    Args:
        value: a batch, or something in it.
        seen: the ids of the objects whose attributes have been listed already: objects may hold each other.
    """
    seen = set() if seen is None else seen
    yield id(value)
    if isinstance(value, Tensor):
        yield None if value.is_inference() else value._version  # torch does not count writes to inference tensors
    elif isinstance(value, Mapping):
        for name, member in value.items():
            yield name
            yield from _contents(member, seen)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _contents(member, seen)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _contents(getattr(value, field.name, None), seen)
    elif hasattr(value, "tobytes"):  # a NumPy array
        yield value.tobytes()
    elif id(value) not in seen and not isinstance(value, type | FunctionType | ModuleType | nn.Module):
        seen.add(id(value))
        yield from _contents(getattr(value, "__dict__", ()), seen)
