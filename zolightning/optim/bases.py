"""Bases of matrices: their shapes and kinds, and where their factors come from.

A basis is a function of (seed, refresh index, parameter name), so checkpoints hold none. Exceptions are factors that
were given to :meth:`~zolightning.optim.subspace.SubspaceOptimizer.resample`, and bases that keep dominant directions of
the momentum (*anchored* ones): these are in the state of their parameter.

Factors have the dtype of the weight. A bf16 run therefore searches in a slightly different subspace from an fp32 run;
with orthonormal factors it ends away from that run by 0.2 to 1.5 % of the distance moved, even with the same losses.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zolightning.directions.autocast import without_autocast
from zolightning.directions.basis import Basis, Sides, gaussian, orthonormal
from zolightning.directions.dense import compute_dtype

GIVEN = {"left": "given_left", "right": "given_right"}  # entries of the state with factors that were given, by side
ANCHORED = ("left", "right")  # ... and with the factors of an anchored basis


class Matrix(NamedTuple):
    """The shape (rows, columns) in which a parameter is searched, and the number of columns of its factors.

    The dimensions after the first are flattened into columns, unless a method says otherwise. For a parameter that
    trains in part (:class:`~zolightning.directions.slices.Slice`), it is the shape of that part.
    """

    rows: int
    columns: int
    rank: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.columns


@dataclass(frozen=True)
class BasisKind:
    """The kind of basis that a method draws.

    Args:
        sides: the sides of a matrix on which a basis has a factor.
        unit: whether the columns of a factor are orthonormal; if not, its entries are Gaussian of unit variance.
    """

    sides: Sides
    unit: bool

    def matrix(self, shape: tuple[int, ...], rank: int) -> Matrix | None:
        """The matrix that a parameter of this shape is searched as; None where it is too thin for a subspace."""
        return _matrix(self.sides, shape, rank)

    def draw(
        self, matrix: Matrix, parameter: nn.Parameter, run: tuple[int, int, str], given: Mapping[str, Tensor]
    ) -> Basis:
        """Draws the factors of a basis, in the dtype of the weight, but for those that were given.

        Args:
            matrix: the shape and rank in which the parameter is searched.
            parameter: the weight.
            run: the run's seed, the index of the basis and the parameter's name.
            given: given factors by side. A factor on a side on which this kind has none replaces the kind's own.
        """
        seed, refresh, name = run

        def factor(side: str, size: int) -> Tensor | None:
            if side in given:
                return given[side]
            if self.sides not in (side, "both") or (given and self.sides != "both"):
                return None
            drawn = gaussian(size, matrix.rank, seed, refresh, f"{name}/{side}", parameter.device)
            drawn = drawn.to(compute_dtype(parameter.dtype))
            with without_autocast(parameter.device):
                return (orthonormal(drawn) if self.unit else drawn).to(parameter.dtype)

        return Basis(factor("left", matrix.rows), factor("right", matrix.columns))

    def unit_rms_scale(self, matrix: Matrix) -> float:
        """The factor that gives ``left @ core @ right.T`` entries of mean square 1, for drawn bases and unit cores."""
        sides = ("left", "right") if self.sides == "both" else (self.sides,)
        return math.prod(self._mean_square(matrix, side) for side in sides) ** -0.5

    def as_long_as_drawn(self, basis: Basis, matrix: Matrix) -> Basis:
        """A given basis, its factors scaled to the Frobenius norm that drawn ones have on average."""
        scaled: dict[str, Tensor] = {}
        for side, factor in basis.by_side.items():
            length = self._mean_square(matrix, side if self.sides == "both" else self.sides) * len(factor)
            wide = factor.to(compute_dtype(factor.dtype))
            scaled[side] = wide * (length / wide.square().sum().clamp_min(torch.finfo(wide.dtype).tiny)).sqrt()
        return Basis(**scaled)

    def is_turned(self, basis: Basis) -> bool:
        """Whether a basis has its one factor on the side opposite to the one this kind draws, because it was given."""
        return self.sides != "both" and getattr(basis, self.sides) is None

    def _mean_square(self, matrix: Matrix, side: str) -> float:
        """Mean squared norm of a row of a drawn factor."""
        return matrix.rank / (matrix.rows if side == "left" else matrix.columns) if self.unit else float(matrix.rank)


def require_factors(basis: Basis, matrix: Matrix | None, name: str, of_momentum: Basis | None) -> None:
    """Raises a ValueError unless a basis can be given for a matrix (None if the parameter is not one) called `name`.

    `of_momentum` is the one-sided basis in which it has momentum, if it has any.
    """
    if matrix is None:
        raise ValueError(
            f"A basis is given for `{name}`, which this method does not search in a subspace: leave it out."
        )
    if not basis.by_side:
        raise ValueError(f"The basis given for `{name}` has no factor: give a left one, a right one or both.")
    for side, factor in basis.by_side.items():
        size = matrix.rows if side == "left" else matrix.columns
        if factor.ndim != 2 or len(factor) != size or not 1 <= factor.shape[1] <= size:
            raise ValueError(
                f"The {side} factor given for `{name}` must have {size} rows and 1 to {size} columns, got the shape "
                f"{tuple(factor.shape)}."
            )
    if of_momentum is not None and (of_momentum.left is None) != (basis.left is None):
        raise ValueError(
            f"The momentum of `{name}` is in a basis on the other side from the one given. Give bases before the first "
            "step, or start a new run from the weights."
        )


@functools.lru_cache(maxsize=4096)  # asked for every parameter several times a step
def _matrix(sides: Sides, shape: tuple[int, ...], rank: int) -> Matrix | None:
    if len(shape) < 2:
        return None
    rows, columns = shape[0], math.prod(shape[1:])
    longest = {"left": rows, "right": columns, "both": min(rows, columns)}[sides]
    return Matrix(rows, columns, min(rank, longest)) if min(rows, columns) > 1 else None
