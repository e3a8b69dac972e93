"""Which blocks move next."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zolightning.kernels.noise import key
from zolightning.optim.checks import require_integer


@dataclass(frozen=True)
class Turn:
    """What an order may go by when a visit of some blocks begins.

    Attributes:
        visit: number of the visit, from 0.
        seed: of the run: the same on all ranks.
        num_blocks: how many there are.
        count: how many to choose.
        norm: 2-norm of a block's weights, by its index.
        squared_grad: squared projected gradient of a block alone, on the batch of the step that comes: a mean over so
            many directions, of two evaluations each (:meth:`~zolightning.optim.ZerothOrderOptimizer.squared_grad`).
    """

    visit: int
    seed: int
    num_blocks: int
    count: int
    norm: Callable[[int], float]
    squared_grad: Callable[[int, int], float]


class Order(ABC):
    """Abstract: says which blocks move next.

    What it draws is a function of the run's seed and the visit's number, so that a resumed run draws the same and
    ranks agree.

    Attributes:
        scores: of each block, at the last choice; empty where the order has none.
    """

    def __init__(self) -> None:
        self.scores: list[float] = []

    @abstractmethod
    def choose(self, turn: Turn) -> Sequence[int]:
        """Indices of the blocks that move in a visit."""

    def check(self, num_blocks: int, count: int) -> None:
        """Raises a ValueError where so many blocks cannot be ordered, `count` of them at a time."""
        if count > num_blocks:
            raise ValueError(f"`blocks_per_step` is {count}, and there are {num_blocks} blocks.")

    def learn(  # noqa: B027  # most orders learn nothing
        self, blocks: Sequence[int], squared_grad: float, alone: Callable[[int, int], float]
    ) -> None:
        """Takes note of a visit that is over.

        Args:
            blocks: that moved.
            squared_grad: mean of the steps' squared projected gradients.
            alone: :attr:`Turn.squared_grad`, of one of the blocks.
        """

    def weight(self, block: int) -> float:
        """What the learning rate is multiplied by while a block moves."""
        return 1.0

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments that are kept under their names, to be compared when a run goes on."""
        names = inspect.signature(type(self).__init__).parameters
        plain = (bool, int, float, str, type(None))
        return {name: value for name, value in vars(self).items() if name in names and isinstance(value, plain)}

    def state_dict(self) -> dict[str, Any]:
        """What later choices depend on, in lists and numbers, none of which is changed later."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        vars(self).update(state)


class Cyclic(Order):
    """Block after block, from the input's to the output's: B-PDF's default.

    Where `count` does not divide the number of blocks, the last visit of an epoch has fewer.

    Args:
        descending: from the output's to the input's.
    """

    def __init__(self, descending: bool = False) -> None:
        super().__init__()
        self.descending = descending

    def choose(self, turn: Turn) -> Sequence[int]:
        indices = list(range(turn.num_blocks))
        return _of_an_epoch(indices[::-1] if self.descending else indices, turn)


class RandomPermutation(Order):
    """Each block once an epoch, in an order drawn anew for every epoch: MeZO-BCD (arXiv 2501.19099)."""

    def choose(self, turn: Turn) -> Sequence[int]:
        return _of_an_epoch(_shuffled(turn, turn.visit // _visits_an_epoch(turn)), turn)


class Uniform(Order):
    """Blocks drawn at each visit, all with the same probability: LeZO, with an interval of 1."""

    def choose(self, turn: Turn) -> Sequence[int]:
        return _shuffled(turn, turn.visit)[: turn.count]


class WeightNorm(Order):
    """The blocks whose weights have the largest 2-norm, a mean over all visits so far: one of B-PDF's rules.

    Weights hardly change their norms in fine-tuning, so that the same blocks move for all of a run: a control.
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
    """The blocks with the largest gradients, measured at each visit: the block Gauss-Southwell-Diagonal rule.

    Each block is perturbed alone; the squared projected gradient g² has the mean ``grad' H^-1 grad`` where the method
    scales its directions by ``H^-1/2`` (Nutini et al. 2017), and that of the gradient's squared norm where it does not.
    Under ``left_state="reset"`` blocks that rest have no curvature estimate: their H is that of a new one.

    A visit costs ``2 queries`` forwards a block, and one query is off by its mean times sqrt(2): of 24 blocks whose
    gradients differ up to fourfold, one query finds the largest in a fifth of all visits, 20 in less than half.

    Args:
        queries: directions to average over, for each block.
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
