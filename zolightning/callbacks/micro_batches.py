"""Cuts a batch into micro-batches or examples, and averages their losses."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from zolightning.evaluation.examples import MicroBatch
from zolightning.evaluation.losses import loss_and_terms
from zolightning.evaluation.nested import batch_size


@runtime_checkable
class HasParts(Protocol):
    """Data of a batch of `size` examples that can make the data of a part of it."""

    size: int

    def part(self, start: int, stop: int) -> Any: ...


def micro_batches(batch: Any, size: int) -> Iterator[Any]:
    """Cuts a batch into parts of at most `size` examples.

    Tensors and arrays with as many rows as the batch has examples are cut, and so is what has a ``part``
    (:class:`HasParts`). Everything else goes into every part unchanged.

    Raises:
        ValueError: if nothing in the batch can be cut.
    """
    total = batch_size(batch)
    if total is None:
        raise ValueError(
            f"`micro_batch_size` is {size}, but a batch of type {type(batch).__name__} has no tensor to cut."
        )

    for start in range(0, total, size):

        def cut(array: Tensor | np.ndarray | HasParts, start: int = start) -> Any:
            if isinstance(array, Tensor | np.ndarray):
                return array[start : start + size] if array.ndim and len(array) == total else array
            return array.part(start, start + size) if array.size == total else array

        yield apply_to_collection(batch, (Tensor, np.ndarray, HasParts), cut)


def with_num_terms(output: Any, batch: Any, device: torch.device | None = None) -> dict[str, Any]:
    """What ``training_step`` returned for a batch, as a dictionary with ``"loss"`` and ``"num_terms"``.

    ``"num_terms"`` is the number of examples in the batch, 0 if it has no rows, unless ``training_step`` returned
    another number. If it returned None to skip the batch, it is 0, and the loss a NaN on `device`.
    """
    if output is None:
        return {"loss": torch.tensor(torch.nan, device=device), "num_terms": 0}
    size = batch_size(batch)
    terms = 1 if size is None else size
    return {"num_terms": terms, **(output if isinstance(output, Mapping) else {"loss": output})}


def evaluate_in_parts(training_step: Callable[[Any], Any], batch: Any, size: int) -> dict[str, Any] | None:
    """The loss of a batch, averaged over its micro-batches by their ``"num_terms"``; None if all are skipped."""
    parts = []
    for part in micro_batches(batch, size):
        output = training_step(part)
        if output is not None:
            parts.append(loss_and_terms(with_num_terms(output, part)))
    if not parts:
        return None
    losses, terms = (torch.stack(values) for values in zip(*parts, strict=True))
    sums = torch.where(terms == 0, 0, losses * terms)  # a mean over no terms may be NaN
    return {"loss": sums.sum() / terms.sum(), "num_terms": terms.sum()}


def in_examples(
    loss: Callable[[Any], Any], batch: Any, size: int | None, rank: int, ranks: int
) -> list[MicroBatch[Any]]:
    """The batch of one rank in parts of `size` examples, or in one part, with the loss of each example.

    Lightning's sampler deals examples to ranks in turn, so example k of a rank is number ``k ranks + rank`` in the
    batch of all ranks.
    """
    examples = {k * ranks + rank: partial(loss, example) for k, example in enumerate(micro_batches(batch, 1))}
    size = size or len(examples)
    numbers = list(examples)
    return [
        MicroBatch(partial(loss, part), {number: examples[number] for number in numbers[k * size : (k + 1) * size]})
        for k, part in enumerate(micro_batches(batch, size))
    ]
