"""Orders: how the blocks that move next are chosen."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zolightning.checks import require_integer
from zolightning.kernels.noise import key
from zolightning.optim.settings import constructor_arguments


@dataclass(frozen=True)
class Turn:
    """What an order may base its choice on. A *visit* is the span of steps in which the chosen blocks move."""

    visit: int  # number of the visit, from 0
    seed: int  # the run's, which is the same on all ranks
    num_blocks: int
    count: int  # of blocks to choose
    norm: Callable[[int], float]  # the 2-norm of a block's weights
    # Of a block and a number of directions: the mean squared projected gradient of that block alone on the batch of the
    # next step, at two evaluations per direction (ZerothOrderOptimizer.squared_grad)
    squared_grad: Callable[[int, int], float]


class Order(ABC):
    """Abstract base of the orders, which choose the blocks that move next.

    What an order draws should be a function of the run's seed and the number of the visit, so that a resumed run and
    all ranks draw the same.

    Attributes:
        scores: the score of each block at the last choice; empty if the order has no scores.
    """

    def __init__(self) -> None:
        self.scores: list[float] = []

    @abstractmethod
    def choose(self, turn: Turn) -> Sequence[int]:
        """Indices of the blocks that move in a visit."""

    def check(self, num_blocks: int, count: int) -> None:
        """Raises a ValueError if the order cannot choose `count` of `num_blocks` blocks."""
        if count > num_blocks:
            raise ValueError(f"`blocks_per_step` is {count}, but there are {num_blocks} blocks.")

    def learn(  # noqa: B027  # most orders learn nothing
        self, blocks: Sequence[int], squared_grad: float, alone: Callable[[int, int], float]
    ) -> None:
        """Called at the end of a visit, with what it showed.

        Args:
            blocks: the blocks that moved.
            squared_grad: mean of the squared projected gradients of the visit's steps.
            alone: :attr:`Turn.squared_grad`, to probe one of the blocks.
        """

    def weight(self, block: int) -> float:
        """The factor that multiplies the learning rate while a block moves."""
        return 1.0

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments with plain values, which are compared when a run is resumed."""
        names = constructor_arguments(type(self))
        plain = (bool, int, float, str, type(None))
        return {name: value for name, value in vars(self).items() if name in names and isinstance(value, plain)}

    def state_dict(self) -> dict[str, Any]:
        """What later choices depend on, as numbers and lists, which must not be changed in place later."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        vars(self).update(state)


class Cyclic(Order):
    """One block after the other, from the input to the output, the default of B-PDF.

    If `count` does not divide the number of blocks, the last visit of a cycle has fewer.

    Args:
        descending: whether to go from the output to the input instead.
    """

    def __init__(self, descending: bool = False) -> None:
        super().__init__()
        self.descending = descending

    def choose(self, turn: Turn) -> Sequence[int]:
        indices = list(range(turn.num_blocks))
        return _of_an_epoch(indices[::-1] if self.descending else indices, turn)


class RandomPermutation(Order):
    """Cycles through the blocks in an order that is drawn anew for each cycle: MeZO-BCD (arXiv 2501.19099)."""

    def choose(self, turn: Turn) -> Sequence[int]:
        return _of_an_epoch(_shuffled(turn, turn.visit // _visits_an_epoch(turn)), turn)


class Uniform(Order):
    """Draws blocks uniformly for each visit; with an interval of 1 this is LeZO."""

    def choose(self, turn: Turn) -> Sequence[int]:
        return _shuffled(turn, turn.visit)[: turn.count]


class WeightNorm(Order):
    """The blocks with the largest 2-norm of their weights, averaged over all visits so far: one of B-PDF's rules.

    Norms hardly change in fine-tuning, so the same blocks move for the whole run. It is useful as a control.
    """

    def __init__(self) -> None:
        super().__init__()
        self.visits = 0

    def choose(self, turn: Turn) -> Sequence[int]:
        norms = [turn.norm(block) for block in range(turn.num_blocks)]
        before = self.scores or norms
        self.visits += 1
        self.scores = [mean + (norm - mean) / self.visits for mean, norm in zip(before, norms, strict=True)]
        return _largest(self.scores, turn.count)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "visits": self.visits}


class GaussSouthwellSweep(Order):
    """The blocks with the largest gradients, which are measured before each visit: the block Gauss-Southwell rule.

    Each block is perturbed alone. The expectation of its squared projected gradient is the squared norm of its
    gradient, or ``grad' H^-1 grad`` if the method scales its directions by ``H^-1/2`` (the Gauss-Southwell-Diagonal
    rule of Nutini et al. 2017). With ``left_state="reset"`` inactive blocks have no curvature estimate and count as new
    ones.

    Measuring costs ``2 queries`` forwards per block, and is noisy: with one query the relative standard deviation is
    sqrt(2). Of 24 blocks whose gradients differ up to fourfold, one query finds the largest in a fifth of all visits,
    and 20 queries in less than half.

    Args:
        queries: number of directions to average over, for each block.
    """

    def __init__(self, queries: int = 1) -> None:
        super().__init__()
        require_integer("queries", queries)
        self.queries = queries

    def choose(self, turn: Turn) -> Sequence[int]:
        self.scores = [turn.squared_grad(block, self.queries) for block in range(turn.num_blocks)]
        return _largest(self.scores, turn.count)


def _visits_an_epoch(turn: Turn) -> int:
    return -(-turn.num_blocks // turn.count)


def _of_an_epoch(indices: Sequence[int], turn: Turn) -> Sequence[int]:
    start = turn.visit % _visits_an_epoch(turn) * turn.count
    return indices[start : start + turn.count]


def _shuffled(turn: Turn, number: int) -> list[int]:
    return sorted(range(turn.num_blocks), key=lambda block: key(turn.seed, number, block, "order of blocks"))


def _largest(scores: Sequence[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda block: -scores[block])[:count]
