"""Contexts of perturbed weights where another function runs in the place of the network."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from zolightning.evaluation.perturbed import Perturbed


@contextmanager
def watched_everywhere(contexts: Sequence[Perturbed]) -> Iterator[Iterable[nn.Module] | None]:
    """Has contexts with the same readers watch all functions for a while, and yields the readers.

    Where another function runs in the place of the network, so few are called that this costs less than to exchange
    the forwards of hundreds of modules.
    """
    readers = contexts[0].readers
    for context in contexts:
        context.readers = None
    try:
        yield readers
    finally:
        for context in contexts:
            context.readers = readers
