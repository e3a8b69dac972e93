"""Slices of parameters: only some rows or columns train."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from zolightning.directions.dense import Negated
from zolightning.directions.perturbation import HasOpposite, Perturbation


@dataclass(frozen=True, eq=False)
class Slice:
    """Entries of a parameter along one dimension, as a compact tensor, without a mask as large as the parameter.

    Args:
        dim: the dimension that `index` refers to.
        index: int64, shape (k,), increasing.
    """

    dim: int
    index: Tensor

    def shape(self, weight: Tensor) -> tuple[int, ...]:
        """The shape of the compact tensor."""
        return (*weight.shape[: self.dim], len(self.index), *weight.shape[self.dim + 1 :])

    def take(self, weight: Tensor) -> Tensor:
        """A contiguous copy of these entries."""
        return weight.index_select(self.dim, self.index.to(weight.device))

    def put(self, weight: Tensor, compact: Tensor) -> None:
        """Writes a tensor like that of :meth:`take` back into `weight`."""
        weight.index_copy_(self.dim, self.index.to(weight.device), compact)

    def check(self, name: str, weight: Tensor) -> None:
        """Raises a ValueError unless this is a slice of `weight`, a parameter called `name`."""
        size = weight.shape[self.dim] if 0 <= self.dim < weight.ndim else 0
        index = self.index
        increasing = index.ndim == 1 and index.dtype == torch.int64 and bool((index.diff() > 0).all())
        if not (increasing and len(index) and int(index[0]) >= 0 and int(index[-1]) < size):
            raise ValueError(
                f"A slice of `{name}`, of shape {tuple(weight.shape)}, must have increasing int64 indices below the "
                f"size of its dimension, got dimension {self.dim} and {index.tolist()[:8]}..."
            )


class SlicedPerturbation:
    """Applies a perturbation of the compact tensor to a slice of the weight."""

    def __init__(self, perturbation: Perturbation, part: Slice) -> None:
        self.perturbation = perturbation
        self.part = part

    def add_to(self, weight: Tensor, out: Tensor) -> None:
        compact = self.part.take(weight)
        perturbed = torch.empty_like(compact)
        self.perturbation.add_to(compact, perturbed)
        out.copy_(weight)
        self.part.put(out, perturbed)

    def opposite(self, negated: Negated) -> "SlicedPerturbation":
        """The same with its direction negated, if what it applies has an opposite."""
        return SlicedPerturbation(cast(HasOpposite, self.perturbation).opposite(negated), self.part)

    def add_to_rows(self, table: Tensor, rows: Tensor, out: Tensor) -> None:
        perturbed = torch.empty_like(table)
        self.add_to(table, perturbed)
        torch.index_select(perturbed, 0, rows, out=out)
