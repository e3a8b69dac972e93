"""What a rank does of a step that it shares with others, and how it learns the rest."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Share:
    """A rank's share of a step: some of its evaluations, on some of its rows.

    Attributes:
        sum: adds up a float64 tensor over all ranks, the same bits on each; None for a rank alone.
        stream: what the loss draws is a function of the run's seed, the step and this number: equal on ranks that read
            the same rows, another one where ranks have rows of their own.
        index, count: the evaluations are cut into `count` parts, of which this rank makes number `index`.
    """

    sum: Callable[[Tensor], Tensor] | None = None
    stream: int = 0
    index: int = 0
    count: int = 1

    def of(self, evaluations: int) -> range:
        """The places of this rank's evaluations; none for the last ranks where there are fewer than parts."""
        start, stop = (-(-evaluations * index // self.count) for index in (self.index, self.index + 1))
        return range(start, stop)


WHOLE = Share()
