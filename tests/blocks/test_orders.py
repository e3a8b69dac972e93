"""Which blocks the orders choose, without a network."""

import math
import random
from collections.abc import Sequence
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zolightning.blocks import AdaLeZO, Bandit, Cyclic, GaussSouthwellSweep, Order, RandomPermutation, Turn, Uniform
from zolightning.blocks.bandit import project_to_simplex
from zolightning.blocks.orders import WeightNorm

D = 5


def choices(order: Order, visits: int, count: int = 1, seed: int = 0, scores: Sequence[float] = range(D)) -> list:
    def turn(visit: int) -> Turn:
        return Turn(visit, seed, len(scores), count, scores.__getitem__, lambda block, _: scores[block])

    return [list(order.choose(turn(visit))) for visit in range(visits)]


@pytest.mark.parametrize("order", [Cyclic(), Cyclic(descending=True), RandomPermutation()])
@pytest.mark.parametrize("count", [1, 2])
def test_each_block_once_an_epoch(order: Order, count: int) -> None:
    visits = math.ceil(D / count)
    chosen = choices(order, 4 * visits, count)
    epochs = [[*chain(*chosen[start : start + visits])] for start in range(0, len(chosen), visits)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(D))] * 4
    assert (len({tuple(epoch) for epoch in epochs}) == 1) == isinstance(order, Cyclic)
    assert chosen == choices(order, 4 * visits, count)  # on another rank, or after a restart
    if isinstance(order, Cyclic):
        assert [*chain(*chosen[:visits])] == [*range(D)][:: -1 if order.descending else 1]


def test_drawn_blocks() -> None:
    chosen = choices(Uniform(), 2000, count=2)
    assert all(len(set(visit)) == 2 for visit in chosen)
    # A binomial with 2,000 trials at 2 / 5: standard deviation 22
    assert all(abs(sum(block in visit for visit in chosen) - 800) < 88 for block in range(D))
    assert chosen != choices(Uniform(), 2000, count=2, seed=1)


def test_blocks_drawn_with_probabilities() -> None:
    order = Bandit()
    order.probabilities = [0.6, 0.1, 0.1, 0.1, 0.1]
    chosen = choices(order, 2000, count=2)
    assert all(len(set(visit)) == 2 for visit in chosen)
    # The first one is drawn first, or second, after another one; four standard deviations of 2,000 trials
    first = 0.6 + 0.4 * 0.6 / 0.9
    for block, share in enumerate([first, *[(2 - first) / 4] * 4]):
        found = sum(block in visit for visit in chosen) / 2000
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / 2000)


def test_largest_scores() -> None:
    scores = [0.5, 3.0, 1.0, 4.0, 2.0]
    assert choices(GaussSouthwellSweep(), 1, count=2, scores=scores) == [[3, 1]]
    norms = WeightNorm()
    assert choices(norms, 2, scores=scores) == [[3], [3]]
    choices(norms, 1, scores=[0.5, 12.0, 1.0, 4.0, 2.0])
    assert norms.scores == pytest.approx([0.5, 6, 1, 4, 2])
    resumed = WeightNorm()
    resumed.load_state_dict(norms.state_dict())
    assert choices(resumed, 1, scores=[27.5, 0, 0, 0, 0]) == [[0]]
    assert resumed.scores == pytest.approx([7.25, 4.5, 0.75, 3, 1.5])  # a mean of four visits


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), st.floats(1e-3, 1))
def test_projection(weights: list[float], floor: float) -> None:
    """Feasible, in the same order, a fixed point, and optimal: free probabilities are one multiple of their weights."""
    p_min = floor / len(weights)
    found = project_to_simplex(weights, p_min)
    assert math.fsum(found) == pytest.approx(1) and min(found) >= p_min * (1 - 1e-9)
    assert project_to_simplex(found, p_min) == pytest.approx(found, rel=1e-6)
    pairs = sorted(zip(weights, found, strict=True))
    assert all(one[1] <= other[1] * (1 + 1e-9) for one, other in pairwise(pairs))
    factors = [p / w for w, p in pairs if p > p_min * (1 + 1e-6)]
    assert not factors or max(factors) == pytest.approx(min(factors))
    # Those at the floor would be below it
    assert not factors or all(w * factors[0] <= p_min * (1 + 1e-5) for w, p in pairs if p <= p_min * (1 + 1e-6))


def simulated(order: Bandit | AdaLeZO, norms: Sequence[float], visits: int, seed: int) -> list[float]:
    """Probabilities after visits of ten steps, whose projected gradients are Gaussian."""
    draw = random.Random(seed)
    for visit in range(visits):
        (block,) = order.choose(Turn(visit, seed, len(norms), 1, norms.__getitem__, lambda *_: 0.0))
        order.reward(block, sum((norms[block] * draw.gauss(0, 1)) ** 2 for _ in range(10)) / 10)
    return order.probabilities


def test_the_bandit_finds_the_largest_gradient() -> None:
    """One of 24 blocks has three times the others' gradient norm; 0.7 in a simulation by hand of twenty seeds."""
    norms = [1.0] * 11 + [3.0] + [1.0] * 12
    found = [simulated(Bandit(step_size=0.05), norms, 200, seed) for seed in range(20)]
    assert sum(probabilities[11] for probabilities in found) / 20 > 0.5
    assert min(map(min, found)) >= 0.1 / 24 * (1 - 1e-9)


@pytest.mark.parametrize(("queries", "scores"), [(0, [0, 1, 0, 1, 0]), (3, [0, 0.25, 0, 1, 0])])
def test_blocks_that_share_a_projected_gradient_are_scored_alone(queries: int, scores: list[float]) -> None:
    order = Bandit(queries=queries)
    choices(order, 1)
    order.learn([1, 3], 7.0, lambda block, count: {1: 4.0, 3: 16.0}[block] * count)
    order.learn([1], 7.0, lambda block, count: 4.0 * count)
    assert order.scores == scores


def test_adalezo_weights_are_unbiased() -> None:
    norms = [1.0, 2.0, 4.0, 0.0, 1.0]
    order = AdaLeZO(p_min=0.05)
    probabilities = simulated(order, norms, 2000, seed=0)
    # Proportional to the norms, of which the fourth is at the floor; a mean over some visits is off by a tenth
    assert probabilities == pytest.approx([0.95 / 8, 1.9 / 8, 3.8 / 8, 0.05, 0.95 / 8], rel=0.5)
    assert sum(p * order.weight(block) for block, p in enumerate(probabilities)) == pytest.approx(1)
    drawn = choices(order, 4000)
    weighted = [sum(order.weight(block) for (visit,) in drawn if visit == block) / 4000 for block in range(D)]
    assert weighted == pytest.approx([1 / D] * D, rel=0.25)


def test_adalezo_takes_unvisited_blocks_for_typical_ones() -> None:
    order = AdaLeZO(decay=0.5)
    choices(order, 1)
    for block, squared_grad in ((0, 4.0), (1, 10.0), (1, 22.0)):
        order.reward(block, squared_grad)
    assert order.scores == [4.0, 16.0, 10.0, 10.0, 10.0]


@pytest.mark.parametrize("order", [Bandit(), AdaLeZO()])
def test_a_visit_without_a_gradient_says_nothing(order: Bandit | AdaLeZO) -> None:
    choices(order, 1)
    order.reward(1, 0.0)
    assert order.probabilities == pytest.approx([1 / D] * D)


@pytest.mark.parametrize("order", [Bandit(), AdaLeZO()])
def test_restored_probabilities(order: Bandit | AdaLeZO) -> None:
    simulated(order, [1.0, 2.0, 3.0], 5, seed=1)
    other = type(order)()
    other.load_state_dict(order.state_dict())
    for twin in (order, other):
        twin.reward(1, 5.0)
    assert other.probabilities == order.probabilities and other.state_dict() == order.state_dict()


def test_what_was_learned_of_other_blocks_is_refused() -> None:
    order = Bandit(p_min=0.25)
    simulated(order, [1.0] * 4, visits=1, seed=0)
    order.check(4, 4)
    with pytest.raises(
        ValueError, match="learned the probabilities of 4 blocks in an earlier run, but there are 3 now"
    ):
        order.check(3, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bandit(p_min=0.25).check(5, 1), "`p_min` is 0.25, but with 5 blocks it can be at most 0.2."),
        (lambda: Bandit(step_size=0), "`step_size` must be a positive number, got 0."),
        (lambda: Bandit(p_min=0), "`p_min` must be above 0 and at most 1 over the number of blocks, got 0."),
        (lambda: Bandit(queries=-1), "`queries` must be an integer, at least 0, got -1."),
        (lambda: AdaLeZO(decay=1), "`decay` must be at least 0 and below 1, got 1."),
        (lambda: AdaLeZO().check(5, 2), "`blocks_per_step` must be 1 for AdaLeZO, which weights"),
        (lambda: Cyclic().check(5, 6), "`blocks_per_step` is 6, but there are 5 blocks."),
        (lambda: Bandit().check(5, 6), "`blocks_per_step` is 6, but there are 5 blocks."),
        (lambda: GaussSouthwellSweep(0), "`queries` must be an integer, at least 1, got 0."),
    ],
)
def test_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
