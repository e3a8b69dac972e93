"""Orders that learn probabilities, so that blocks with large gradients move more often."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from zolightning.blocks.orders import Order, Turn
from zolightning.checks import require_fraction, require_integer, require_positive
from zolightning.kernels.noise import key


def project_to_simplex(weights: Sequence[float], p_min: float) -> list[float]:
    """The Kullback-Leibler projection of some weights onto the probabilities that are all at least `p_min`.

    The result is the weights, which are positive, times a common factor, or `p_min` where that is larger.
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
    """Abstract: draws blocks with probabilities, which a subclass updates after each visit of a block.

    Args:
        p_min: the least probability of a block; None for a tenth of the initial one, ``0.1 / blocks``.
        queries: number of directions along which a block is probed alone at the end of its visit, to score it. At 0 the
            projected gradients of the visit's steps are its score.

    Attributes:
        probabilities: the probability of each block at the last choice.
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
        """Updates the probabilities with the score of a block that moved."""

    def learn(self, blocks: Sequence[int], squared_grad: float, alone: Callable[[int, int], float]) -> None:
        for block in blocks:
            self.reward(block, alone(block, self.queries) if self.queries else squared_grad)

    def check(self, num_blocks: int, count: int) -> None:
        super().check(num_blocks, count)
        if self.p_min is not None and self.p_min * num_blocks > 1:
            raise ValueError(
                f"`p_min` is {self.p_min:g}, but with {num_blocks} blocks it can be at most {1 / num_blocks:.4g}."
            )
        if self.probabilities and len(self.probabilities) != num_blocks:
            raise ValueError(
                f"`order` is a {type(self).__name__} that has learned the probabilities of {len(self.probabilities)} "
                f"blocks in an earlier run, but there are {num_blocks} now: give each run its own order."
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
    """FOCUS (our reconstruction): a bandit whose reward is the squared projected gradient of the block that moved.

    The paper's text is not public. We follow AdamBS, with gains instead of losses. A visit with mean squared projected
    gradient s has the reward r = s / (the largest s so far). The weight of its block is ``p exp(step_size r / p)``,
    that of others p, and the new probabilities are the Kullback-Leibler projection of the weights onto probabilities of
    at least `p_min`. It approximates the block Gauss-Southwell rule by scores from each block's last visit, without
    probing all blocks.

    If other parameters move together with a block (``others="always"``, or several blocks at a time), the projected
    gradient is that of all of them. `queries` then probes each block alone, for ``2 queries`` forwards a visit.

    Args:
        step_size: how fast probabilities change: about 0.02 for 2,000 visits, 0.05 for 200.
        **settings: `p_min` and `queries` of :class:`LearnedProbabilities`.
    """

    def __init__(self, step_size: float = 0.05, **settings: Any) -> None:
        super().__init__(**settings)
        require_positive("step_size", step_size)
        self.step_size = step_size
        self.max_seen = 0.0

    def reward(self, block: int, squared_grad: float) -> None:
        self.max_seen = max(self.max_seen, squared_grad)
        self.scores = list(self.scores) or [0.0] * len(self.probabilities)
        weights = list(self.probabilities)
        self.scores[block] = squared_grad / self.max_seen if self.max_seen else 0.0
        # Only ratios of weights matter, and a weight this large leaves all others at the floor.
        weights[block] *= math.exp(min(self.step_size * self.scores[block] / weights[block], 500))
        self.probabilities = project_to_simplex(weights, self.floor())

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "probabilities": self.probabilities, "max_seen": self.max_seen}


class AdaLeZO(LearnedProbabilities):
    """Importance sampling of blocks, after AdaLeZO (arXiv 2604.18264, of which we have only read the abstract).

    The score of a block is an exponential mean of the squared projected gradients of its visits; blocks not visited yet
    have the mean score of the others. Probabilities are proportional to the root of the scores, which minimizes the
    variance, and at least `p_min`. The learning rate of a step is multiplied by ``1 / (blocks * p)``, at most 10 by
    default, so that each block moves, on average, as if all had the same probability.

    Args:
        decay: decay of the exponential mean, per visit of a block.
        **settings: `p_min` and `queries` of :class:`LearnedProbabilities`.
    """

    def __init__(self, decay: float = 0.8, **settings: Any) -> None:
        super().__init__(**settings)
        require_fraction("decay", decay)
        self.decay = decay
        self.means: dict[int, float] = {}

    def check(self, num_blocks: int, count: int) -> None:
        super().check(num_blocks, count)
        if count > 1:
            raise ValueError(
                f"`blocks_per_step` must be 1 for AdaLeZO, which weights the step of one block by its probability, got "
                f"{count}."
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
    """Draws an index with these probabilities, which need not sum to 1, with a number `uniform` in [0, 1)."""
    rest = uniform * math.fsum(probabilities.values())
    for index, probability in probabilities.items():
        rest -= probability
        if rest < 0:
            return index
    return max(probabilities)  # past the end by a rounding error
