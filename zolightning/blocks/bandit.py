"""Blocks drawn by probabilities that are learned: more often where gradients are large."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from zolightning.blocks.orders import Order, Turn
from zolightning.kernels.noise import key
from zolightning.optim.checks import require_fraction, require_integer, require_positive


def project_to_simplex(weights: Sequence[float], p_min: float) -> list[float]:
    """The probabilities, each at least `p_min`, that are nearest to some weights in Kullback-Leibler divergence.

    These are the weights times a common factor, and `p_min` where that would be less.

    Args:
        weights: positive; they need not sum to one.
        p_min: at most ``1 / len(weights)``.
    """
    smallest_first = sorted(range(len(weights)), key=lambda index: weights[index])
    rest = math.fsum(weights)
    factor, fixed = 1 / rest, 0
    for index in smallest_first:
        if weights[index] * factor >= p_min or fixed + 1 == len(weights):
            break
        fixed += 1
        rest = math.fsum(weights[i] for i in smallest_first[fixed:])
        factor = (1 - fixed * p_min) / rest
    at_floor = set(smallest_first[:fixed])
    return [p_min if index in at_floor else weight * factor for index, weight in enumerate(weights)]


class LearnedProbabilities(Order):
    """Abstract: draws blocks by probabilities; a subclass says what becomes of these after a visit.

    Args:
        p_min: the least probability of a block; None for a tenth of what all have at first, ``0.1 / blocks``.
        queries: directions to probe each block that moved with, alone, when its visit ends; 0 for none: the visit is
            scored by its steps.

    Attributes:
        probabilities: of each block, at the last choice.
    """

    def __init__(self, p_min: float | None = None, queries: int = 0) -> None:
        super().__init__()
        require_integer("queries", queries, least=0)
        self.queries = queries
        if p_min is not None and not 0 < p_min <= 0.5:
            raise ValueError(f"`p_min` must be above 0 and at most 1 over the number of blocks, got {p_min!r}.")
        self.p_min = p_min
        self.probabilities: list[float] = []

    @abstractmethod
    def reward(self, block: int, squared_grad: float) -> None:
        """Changes the probabilities by the score of a block that moved."""

    def learn(self, blocks: Sequence[int], squared_grad: float, alone: Callable[[int, int], float]) -> None:
        for block in blocks:
            self.reward(block, alone(block, self.queries) if self.queries else squared_grad)

    def check(self, num_blocks: int, count: int) -> None:
        super().check(num_blocks, count)
        if self.p_min is not None and self.p_min * num_blocks > 1:
            raise ValueError(
                f"`p_min` is {self.p_min:g}, which {num_blocks} blocks cannot have each: at most {1 / num_blocks:.4g}."
            )

    def choose(self, turn: Turn) -> Sequence[int]:
        """Draws without replacement within a visit, with replacement from visit to visit."""
        if not self.probabilities:
            self.probabilities = [1 / turn.num_blocks] * turn.num_blocks
        left = dict(enumerate(self.probabilities))
        chosen: list[int] = []
        for draw in range(turn.count):
            word = key(turn.seed, turn.visit, draw, "drawn block")[0] % 2**32
            chosen.append(_drawn(left, word / 2**32))
            del left[chosen[-1]]
        return chosen

    def floor(self) -> float:
        """The least probability."""
        return 0.1 / len(self.probabilities) if self.p_min is None else self.p_min


class Bandit(LearnedProbabilities):
    """FOCUS (reconstructed): a bandit whose reward is the squared projected gradient of the block that moved.

    The paper's text is not public. After the form of AdamBS, with gains: of a visit with mean squared projected
    gradient s, the reward is r = s / max s so far; the block's weight becomes ``p exp(step_size r / p)``, the others'
    stay p; the new probabilities are the Kullback-Leibler projection of the weights on those of at least `p_min`. These
    follow the block Gauss-Southwell rule without its sweep, by scores as old as a block's last visit.

    Where others move beside a block (``others="always"``, or more than one a step) they share one projected gradient,
    of which the block may be the smaller part: `queries` has each probed alone, for ``2 queries`` forwards a visit.

    Args:
        step_size: how fast probabilities change: 0.02 for some 2,000 visits, 0.05 for 200.
        p_min: the least probability of a block; None for ``0.1 / blocks``.
        queries: directions that a block is probed with alone when its visit ends; 0: its steps are its score.
    """

    def __init__(self, step_size: float = 0.05, p_min: float | None = None, queries: int = 0) -> None:
        super().__init__(p_min, queries)
        require_positive("step_size", step_size)
        self.step_size = step_size
        self.max_seen = 0.0

    def reward(self, block: int, squared_grad: float) -> None:
        self.max_seen = max(self.max_seen, squared_grad)
        self.scores = list(self.scores) or [0.0] * len(self.probabilities)
        weights = list(self.probabilities)
        self.scores[block] = squared_grad / self.max_seen if self.max_seen else 0.0
        # Weights count by their ratios: what would overflow leaves the others at the floor anyway.
        weights[block] *= math.exp(min(self.step_size * self.scores[block] / weights[block], 500))
        self.probabilities = project_to_simplex(weights, self.floor())

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "probabilities": self.probabilities, "max_seen": self.max_seen}


class AdaLeZO(LearnedProbabilities):
    """After AdaLeZO (arXiv 2604.18264, of which the abstract was read): a bandit that forgets, without bias.

    A block's score is an exponential mean of its visits' squared projected gradients; of blocks not yet visited, the
    mean of the others'. Probabilities are proportional to the root of the scores, which gives a sum of weighted
    estimates the least variance, and at least `p_min`. The learning rate of a step is weighted by ``1 / (blocks * p)``,
    so that on average each block moves as if all were drawn alike.

    Args:
        decay: of the exponential mean, from visit to visit of a block.
        p_min: the least probability of a block, which bounds the weights; None for ``0.1 / blocks``: weights up to 10.
        queries: directions that a block is probed with alone when its visit ends; 0: its steps are its score.
    """

    def __init__(self, decay: float = 0.8, p_min: float | None = None, queries: int = 0) -> None:
        super().__init__(p_min, queries)
        require_fraction("decay", decay)
        self.decay = decay
        self.means: dict[int, float] = {}

    def check(self, num_blocks: int, count: int) -> None:
        super().check(num_blocks, count)
        if count > 1:
            raise ValueError(
                f"`blocks_per_step` is {count}, and AdaLeZO weights the step of one block by its probability: 1."
            )

    def reward(self, block: int, squared_grad: float) -> None:
        before = self.means.get(block, squared_grad)
        self.means = self.means | {block: self.decay * before + (1 - self.decay) * squared_grad}
        typical = math.fsum(self.means.values()) / len(self.means)
        self.scores = [self.means.get(block, typical) for block in range(len(self.probabilities))]
        roots = [math.sqrt(score) for score in self.scores]
        if any(roots):
            self.probabilities = project_to_simplex(roots, self.floor())

    def weight(self, block: int) -> float:
        return 1 / (len(self.probabilities) * self.probabilities[block])

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "probabilities": self.probabilities, "means": self.means}


def _drawn(probabilities: dict[int, float], uniform: float) -> int:
    """The index whose share of the sum of probabilities holds `uniform`, of [0, 1)."""
    rest = uniform * math.fsum(probabilities.values())
    for index, probability in probabilities.items():
        rest -= probability
        if rest < 0:
            return index
    return max(probabilities)  # past the end by a rounding error
