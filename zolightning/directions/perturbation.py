"""The interface of perturbations of a weight."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Perturbation(Protocol):
    """Anything that can write a perturbed weight: a :class:`~zolightning.directions.dense.Direction`, for one."""

    def add_to(self, weight: Tensor, out: Tensor) -> None:
        """Writes the perturbed `weight` to `out`; both contiguous, of the same shape and dtype."""

    def add_to_rows(self, table: Tensor, rows: Tensor, out: Tensor) -> None:
        """Writes the perturbed ``table[rows]``, shape (k, n), to `out`; `table` is (m, n), `rows` integers (k,)."""


class HasOpposite(Perturbation, Protocol):
    """A perturbation whose opposite is known, as those of this package are."""

    def opposite(self, negated: Callable[[Any], Any]) -> "HasOpposite":
        """The same with its directions negated, whose coefficients are ``negated(direction)``; pending updates stay."""


@dataclass(frozen=True, eq=False)
class Uncopied:
    """Marks a large tensor of a perturbation that stays at its address: CUDA graphs read it there, without a copy."""

    tensor: Tensor
