"""Directions that lean towards a stored tensor, so that they lie in a cone around it (ConMeZO)."""

import torch
from torch import Tensor

from zolightning.directions.dense import DerivedDirection, Direction, Negated
from zolightning.directions.perturbation import Uncopied
from zolightning.kernels.compiled import chunk_size, chunks
from zolightning.kernels.noise import CODE_SCALE


class ConeDirection(DerivedDirection):
    """``direction + scale * axis``, computed where it is added; it takes one more pass over memory than the direction.

    Args:
        direction: the direction without the lean.
        axis: (n,), the flat tensor towards which the result leans, float32, or float64 for double-precision weights.
        scale: the coefficient of `axis`, a tensor without dimensions, of the same dtype and device.
    """

    def __init__(self, direction: Direction, axis: Tensor, scale: Tensor) -> None:
        super().__init__(direction)
        self.axis = Uncopied(axis)
        self.scale = scale

    def opposite(self, negated: Negated) -> "ConeDirection":
        return ConeDirection(super().opposite(negated), self.axis.tensor, -self.scale)

    def is_opposite(self, other: object) -> bool:
        """False: only the device knows whether the scales are opposite. So :meth:`add_both` is never called."""
        return False

    def of_elements(self, weight: Tensor, start: int = 0) -> Tensor:
        # Separate sums and products: fused ones would round differently on a GPU than on a CPU.
        found = self.axis.tensor[start : start + weight.numel()] * self.scale
        super().accumulate(found, start=start)
        return found

    def add_to(self, weight: Tensor, out: Tensor, start: int = 0) -> None:
        weight, out, axis = weight.view(-1), out.view(-1), self.axis.tensor[start : start + weight.numel()]
        size = chunk_size(weight)
        buffer = axis.new_empty(min(size, weight.numel()))
        for part in chunks(weight.numel(), size):
            move = torch.mul(axis[part], self.scale, out=buffer[: part.stop - part.start])
            super().accumulate(move, start=start + part.start)
            out[part].copy_(move.add_(weight[part]))

    def add_to_rows(self, table: Tensor, rows: Tensor, out: Tensor) -> None:
        columns = torch.arange(table.shape[1], device=rows.device)
        index = (rows.long()[:, None] * table.shape[1] + columns).to(torch.int32)
        move = self.at(index) + self.axis.tensor.view(table.shape)[rows] * self.scale
        out.copy_(table[rows] + move)

    def unit_noise(self, weight: Tensor, start: int = 0) -> Tensor:
        """The direction divided by the coefficient of its one query: noise of unit variance with the same lean."""
        assert self.values is not None
        return self.of_elements(weight, start).float() / (self.values[0] / CODE_SCALE[self.kind])
