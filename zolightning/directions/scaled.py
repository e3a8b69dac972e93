"""Directions divided by the root of a diagonal curvature, so that flat coordinates are perturbed more (HiZOO)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zolightning import kernels
from zolightning.directions.dense import DerivedDirection, Direction
from zolightning.directions.perturbation import Uncopied
from zolightning.directions.shards import gathered, is_sharded
from zolightning.kernels.compiled import CHUNK, chunk_size

Part = tuple[slice, Tensor]  # some elements of a flat tensor, and their curvature


class FullCurvature:
    """A curvature with a number for every element.

    Args:
        values: (n,), positive, float32, or float64 for double-precision parameters.
        parameter: the parameter, of n elements, given if it may be sharded over ranks (FSDP2). `values` then belong to
            this rank's rows; those of other ranks are gathered at each use, so all ranks must use it at the same time.
    """

    def __init__(self, values: Tensor, parameter: Tensor | None = None) -> None:
        self.values = Uncopied(values)
        self.parameter = parameter if parameter is not None and is_sharded(parameter) else None

    def whole(self) -> Tensor:
        """The curvature of all elements, (n,), those of other ranks included."""
        return self.values.tensor if self.parameter is None else gathered(self.values.tensor, self.parameter)

    def parts(self, start: int, numel: int) -> Iterator[Part]:
        """The curvature of the `numel` elements from `start` on, as pairs of a slice (0 is `start`) and its values."""
        yield slice(0, numel), self.whole()[start : start + numel]

    def at_rows(self, rows: Tensor, columns: int) -> Tensor:
        """The curvature of some rows of a matrix, (k, columns), given their indices, (k,)."""
        return F.embedding(rows, self.whole().view(-1, columns))


class FactoredCurvature:
    """A curvature of a matrix that is the outer product of two vectors, within bounds.

    Args:
        rows: (m,), float32, or float64 for double-precision parameters.
        columns: (n,), likewise.
        floor: smallest value of an element; smaller products are raised to it.
        ceiling: largest value of an element.
    """

    def __init__(self, rows: Tensor, columns: Tensor, floor: float, ceiling: float) -> None:
        self.rows = rows
        self.columns = columns
        self.floor = floor
        self.ceiling = ceiling

    def parts(self, start: int, numel: int) -> Iterator[Part]:
        """As :meth:`FullCurvature.parts`, but computed for a few whole rows at a time, so that none is kept.

        Each slice has an even number of rows, because noise comes in pairs of elements.
        """
        columns = len(self.columns)
        size = max(max(CHUNK, chunk_size(self.rows)) // columns // 2 * 2, 2)
        first, count = start // columns, numel // columns
        for row in range(0, count, size):
            own = self._outer(self.rows[first + row : first + min(row + size, count)]).view(-1)
            yield slice(row * columns, row * columns + own.numel()), own

    def at_rows(self, rows: Tensor, columns: int) -> Tensor:
        return self._outer(self.rows[rows])

    def _outer(self, rows: Tensor) -> Tensor:
        return torch.outer(rows, self.columns).clamp_(self.floor, self.ceiling)


class ScaledDirection(DerivedDirection):
    """``direction / sqrt(curvature)``, computed where it is added."""

    def __init__(self, direction: Direction, curvature: FullCurvature | FactoredCurvature) -> None:
        super().__init__(direction)
        self.curvature = curvature

    def arguments(self) -> dict[str, Any]:
        """As for any direction; only for a full curvature."""
        assert isinstance(self.curvature, FullCurvature)
        return {"noise": self, "start": 0, "curvature": self.curvature.whole()}

    def add_to(self, weight: Tensor, out: Tensor, start: int = 0) -> None:
        weight, out = weight.view(-1), out.view(-1)
        for part, own in self.curvature.parts(start, weight.numel()):
            kernels.perturb(out[part], weight[part], self, start + part.start, own)

    def add_both(self, weight: Tensor, plus: Tensor, minus: Tensor, start: int = 0) -> None:
        weight, plus, minus = weight.view(-1), plus.view(-1), minus.view(-1)
        for part, own in self.curvature.parts(start, weight.numel()):
            kernels.perturb_both(plus[part], minus[part], weight[part], self, start + part.start, own)

    def of_elements(self, weight: Tensor, start: int = 0) -> Tensor:
        found = super().of_elements(weight, start)
        for part, own in self.curvature.parts(start, weight.numel()):
            found[part].div_(own.sqrt())
        return found

    def add_to_rows(self, table: Tensor, rows: Tensor, out: Tensor) -> None:
        own = self.curvature.at_rows(rows, table.shape[1])
        kernels.perturb_rows(out, table, rows, self, own)
