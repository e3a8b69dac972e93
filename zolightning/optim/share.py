"""The part of a step that a rank computes, and how it gets the results of the other ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zolightning.rank_zero import rank_zero_warn


@dataclass(frozen=True)
class Share:
    """A rank's share of a step: some of its evaluations, on some of its rows.

    Attributes:
        sum: adds up a float64 tensor over all ranks, with the same bits on each; None for a single rank.
        stream: selects the random numbers that the loss draws, together with the run's seed and the step: equal on
            ranks that read the same rows, different on ranks with different rows.
        index, count: the evaluations are divided into `count` parts, of which this rank makes number `index`.
    """

    sum: Callable[[Tensor], Tensor] | None = None
    stream: int = 0
    index: int = 0
    count: int = 1

    def of(self, evaluations: int) -> range:
        """The indices of this rank's evaluations; empty for some ranks if there are fewer evaluations than parts."""
        start, stop = (-(-evaluations * index // self.count) for index in (self.index, self.index + 1))
        return range(start, stop)


WHOLE = Share()


def warn_of_other_processes() -> None:
    """Warns about a step without a share in one of several processes: its weights would differ from the others'."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = torch.distributed.get_world_size()
        if count > 1:
            rank_zero_warn(
                f"{count} processes run, but `estimate` has no `share`: each moves its weights by its own losses, so "
                "their weights differ from now on. Give it `Share(sum, stream)`, which sums losses over all of them."
            )
