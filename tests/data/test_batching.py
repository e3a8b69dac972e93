"""The order of examples."""

import random
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zolightning.data.batching import Batches, LengthBuckets, TrainLoader, even_batches

lengths_and_batch_size = st.tuples(st.lists(st.integers(1, 300), min_size=1, max_size=120), st.integers(1, 9))


def run(order: LengthBuckets, num_batches: int) -> list[list[int]]:
    return [order[index] for index in range(num_batches)]


@given(lengths_and_batch_size, st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_an_epoch_holds_each_example_once(case: tuple[list[int], int], seed: int, epoch: int) -> None:
    lengths, batch_size = case
    order = LengthBuckets(lengths, batch_size, seed)
    batches = [order[epoch * len(order) + index] for index in range(len(order))]
    seen = [example for batch in batches for example in batch]
    assert len(seen) == len(set(seen))
    assert set(seen) <= set(range(len(lengths)))
    if len(lengths) < batch_size:
        assert [len(batch) for batch in batches] == [len(lengths)]
    else:
        assert {len(batch) for batch in batches} == {batch_size}
        assert len(lengths) - len(seen) < batch_size


@given(lengths_and_batch_size, st.integers(0, 9), st.randoms(use_true_random=False))
def test_a_batch_depends_on_its_number_alone(case: tuple[list[int], int], seed: int, shuffler: random.Random) -> None:
    lengths, batch_size = case
    forward = run(LengthBuckets(lengths, batch_size, seed), 12)
    order, indices = LengthBuckets(lengths, batch_size, seed), list(range(12))
    shuffler.shuffle(indices)
    for index in indices:
        torch.rand(1)
        np.random.rand()
        assert order[index] == forward[index]


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1]
    run(LengthBuckets(range(1, 50), 4), 30)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_epochs_and_seeds_differ() -> None:
    lengths = list(range(1, 65))
    order = LengthBuckets(lengths, 8, seed=0)
    assert order.epoch(0) != order.epoch(1)
    assert order.epoch(0) != LengthBuckets(lengths, 8, seed=1).epoch(0)


def test_fixed_batches_come_again_in_another_order() -> None:
    order = LengthBuckets(range(1, 100), 8, fixed=True)
    first, second = order.epoch(0), order.epoch(1)
    assert first != second and sorted(first) == sorted(second)
    assert sorted(first) == sorted(LengthBuckets(range(1, 100), 8).epoch(0))


@given(lengths_and_batch_size, st.integers(1, 4))
def test_ranks_share_the_batch_of_one_rank(case: tuple[list[int], int], num_replicas: int) -> None:
    lengths, batch_size = case
    lengths = lengths * num_replicas
    whole = LengthBuckets(lengths, batch_size * num_replicas)
    ranks = [LengthBuckets(lengths, batch_size, 0, num_replicas, rank) for rank in range(num_replicas)]
    assert {len(rank) for rank in ranks} == {len(whole)}
    for index in range(2 * len(whole)):
        parts = [rank[index] for rank in ranks]
        assert sorted(chain.from_iterable(parts)) == sorted(whole[index])
        assert all(parts)
        if len(lengths) >= batch_size * num_replicas:
            assert {len(part) for part in parts} == {batch_size}


def padding(lengths: list[int], batches: list[list[int]]) -> int:
    return sum(max(map(lengths.__getitem__, batch)) - lengths[index] for batch in batches for index in batch)


def test_buckets_save_padding() -> None:
    lengths = np.random.RandomState(1).lognormal(3, 0.7, 1000).astype(int).tolist()
    plain = LengthBuckets(lengths, 16, bucket_batches=1)
    bucketed = LengthBuckets(lengths, 16)
    assert padding(lengths, bucketed.epoch(0)) < 0.4 * padding(lengths, plain.epoch(0))


@given(lengths_and_batch_size, st.integers(1, 5))
def test_evaluation_counts_each_example_once_in_equally_many_batches(
    case: tuple[list[int], int], num_replicas: int
) -> None:
    lengths, batch_size = case
    lengths = lengths + [1] * num_replicas
    ranks = [even_batches(lengths, batch_size, num_replicas, rank) for rank in range(num_replicas)]
    sizes = {len(batch) for batches in ranks for batch in batches}
    assert sorted(example for batches in ranks for batch in batches for example in batch) == list(range(len(lengths)))
    assert len({len(batches) for batches in ranks}) == 1
    assert min(sizes) >= 1
    assert max(sizes) <= max(batch_size, 2)
    assert max(sizes) - min(sizes) <= 1


def test_all_ranks_look_at_the_first_examples_in_the_same_batches() -> None:
    """Ranks that share weights would otherwise wait for each other."""
    found = []
    for rank in range(2):  # which have 7 and 6 of the 13 examples
        batches = Batches(range(13), LengthBuckets([1] * 13, 8, num_replicas=2, rank=rank), list)
        found.append(list(TrainLoader(batches, batch_size=None).first_batches(100)))
    assert found == [[list(range(7)), list(range(7, 13))]] * 2


def test_evaluation_starts_with_the_longest() -> None:
    assert even_batches([5, 9, 7, 1, 8], 2) == [[1, 4], [2, 0], [3]]


def test_more_ranks_than_examples() -> None:
    for make in (LengthBuckets, even_batches):
        with pytest.raises(ValueError, match="3 examples are too few for 4 ranks"):
            make([1, 2, 3], 2, num_replicas=4)
