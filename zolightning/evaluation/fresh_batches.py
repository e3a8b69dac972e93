"""Gives each evaluation of a step the batch as it was loaded, even if ``training_step`` changes the one it gets."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from zolightning.evaluation.nested import map_tensors


class FreshBatches:
    """Evaluates ``training_step`` on batches that none of its earlier calls has changed.

    It may write to a tensor of its batch (``x.div_(255)``), or take an entry out of it (``batch.pop("labels")``), which
    the next evaluation of the same step would miss. The first call of a fit gets a copy, which shows whether it does;
    if so, every call gets one. Objects that are not tensors, mappings, lists, tuples or dataclasses are passed on as
    they are.
    """

    def __init__(self) -> None:
        self._copies: bool | None = None  # None before the first call

    def evaluate(self, training_step: Callable[[Any], Any], batch: Any) -> Any:
        """What ``training_step`` returns for a batch, which stays as it is.

        Raises:
            ValueError: if it changes its batch, and has not done so in the first call.
        """
        if self._copies is not False:
            batch = copied(batch)
            if self._copies:
                return training_step(batch)
        before = list(_contents(batch))
        output = training_step(batch)
        is_changed = list(_contents(batch)) != before
        if self._copies is not None and is_changed:
            raise ValueError(
                "`training_step` has changed its batch in place, which it did not do in the first step, but is "
                "evaluated several times on each batch. Let it change a copy: `x = x.clone()`, `batch = dict(batch)`."
            )
        self._copies = is_changed
        return output


def copied(batch: Any) -> Any:
    """A batch with copies of all tensors in it, and of what holds them."""
    return map_tensors(Tensor.clone, batch)


def _contents(value: Any) -> Iterator[Any]:
    """Shows whether a batch was changed: which objects it holds, and how often its tensors were written to."""
    yield id(value)
    if isinstance(value, Tensor):
        yield None if value.is_inference() else value._version  # torch does not count writes to inference tensors
    elif isinstance(value, Mapping):
        for name, member in value.items():
            yield name
            yield from _contents(member)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _contents(member)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _contents(getattr(value, field.name, None))
