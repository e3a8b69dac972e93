"""Which rows are sampled."""

from collections import Counter

import numpy as np
import pytest

from zolightning.data.sampling import sample, sample_per_class, sample_train_and_validation
from zolightning.data.source import Split


def split_of(size: int, num_classes: int = 2) -> Split:
    return Split("rows.jsonl", "line", range(size), [index % num_classes for index in range(size)], None)


def mezo(size: int, num_train: int, num_validation: int, seed: int) -> tuple[list[int], list[int]]:
    """MeZO's rule restated with numpy's global generator."""
    np.random.seed(seed)
    chosen = np.random.permutation(size)[: num_train + num_validation].tolist()
    return chosen[: len(chosen) - num_validation], chosen[len(chosen) - num_validation :]


@pytest.mark.parametrize("size", [2490, 1500, 554, 51])
@pytest.mark.parametrize("seed", [0, 42])
def test_train_and_validation_are_those_of_mezo(size: int, seed: int) -> None:
    train, validation = sample_train_and_validation(split_of(size), 1000, 50, seed)
    assert (train, validation) == mezo(size, 1000, 50, seed)
    assert len(validation) == 50
    assert not set(train) & set(validation)


@pytest.mark.parametrize("size", [872, 5000])
def test_test_rows_are_those_of_mezo(size: int) -> None:
    np.random.seed(3)
    assert sample(split_of(size), 1000, 3) == np.random.permutation(size)[:1000].tolist()


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    sample(split_of(10), 4, 0)
    assert np.random.rand() == expected


def test_too_few_rows_to_train_on() -> None:
    message = r"rows.jsonl has 50 rows: `data.num_validation` 50 leaves none of them for `data.num_train` 10"
    with pytest.raises(ValueError, match=message):
        sample_train_and_validation(split_of(50), 10, 50, 0)


def test_examples_per_class() -> None:
    split = split_of(100, num_classes=3)
    train, validation = sample_per_class(split, 16, (0, 1, 2), 2, seed=13)
    assert not set(train) & set(validation)
    for part in (train, validation):
        assert Counter(split.labels[index] for index in part) == {0: 16, 1: 16, 2: 16}
    assert sample_per_class(split, 16, (0, 1, 2), 2, seed=21)[0] != train


def test_too_few_rows_of_a_class() -> None:
    split = Split("rows.jsonl", "line", range(25), [0] * 15 + [1] * 10, None)
    message = r"rows.jsonl: `data.examples_per_class` 6 needs 12 rows of each class, but label 'wet' has 10"
    with pytest.raises(ValueError, match=message):
        sample_per_class(split, 6, ("dry", "wet"), 2, seed=0)
