"""Draws rows of a split by their indices, as MeZO and LM-BFF do, so that the same seed has the same rows as theirs."""

from collections.abc import Sequence

import numpy as np

from zolightning.data.source import Split
from zolightning.data.task import Label
from zolightning.messages import counted


def sample(split: Split, count: int, seed: int) -> list[int]:
    """Returns `count` random indices, or all if there are fewer.

    The permutation is that of ``numpy.random.seed(seed); numpy.random.permutation(len(split))``, so it is the
    one of MeZO's code (https://github.com/princeton-nlp/MeZO) and of those built on it.
    """
    return np.random.RandomState(seed).permutation(len(split))[:count].tolist()


def sample_train_and_validation(
    split: Split, num_train: int, num_validation: int, seed: int
) -> tuple[list[int], list[int]]:
    """Splits one source in two: the last `num_validation` of the sampled rows are for validation, as in MeZO.

    If there are too few rows, training gets fewer, and validation as many as asked for.

    Raises:
        ValueError: if no row would be left to train on.
    """
    chosen = sample(split, num_train + num_validation, seed)
    if len(chosen) <= num_validation:
        raise ValueError(
            f"{split.origin} has {counted(len(chosen), 'row')}: `data.num_validation` {num_validation} leaves none of "
            f"them for `data.num_train` {num_train}."
        )
    return chosen[:-num_validation], chosen[-num_validation:]


def sample_per_class(
    split: Split, per_class: int, labels: Sequence[Label], num_parts: int, seed: int
) -> list[list[int]]:
    """Draws `num_parts` disjoint lists of indices that hold `per_class` rows of each class, as LM-BFF does
    (Gao et al., 2021, arXiv:2012.15723).

    Raises:
        ValueError: if a class has too few rows.
    """
    by_class: list[list[int]] = [[] for _ in labels]
    for index in sample(split, len(split), seed):
        by_class[split.labels[index]].append(index)
    for label, members in zip(labels, by_class, strict=True):
        if len(members) < per_class * num_parts:
            raise ValueError(
                f"{split.origin}: `data.examples_per_class` {per_class} needs {counted(per_class * num_parts, 'row')} "
                f"of each class, but label {label!r} has {len(members)}."
            )
    starts = range(0, per_class * num_parts, per_class)
    return [[index for members in by_class for index in members[start : start + per_class]] for start in starts]
