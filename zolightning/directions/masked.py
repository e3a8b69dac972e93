"""Directions that leave some elements of a parameter unchanged to the bit."""

from typing import Protocol

import torch
from torch import Tensor

from zolightning import kernels
from zolightning.directions.dense import DerivedDirection, Direction
from zolightning.kernels.compiled import chunk_size, chunks
from zolightning.kernels.noise import hash_bits


class MagnitudeMasked(DerivedDirection):
    """A direction restricted to small weights; the mask is computed from the stored parameter when it is used.

    Args:
        direction: the direction to mask.
        threshold: elements whose absolute value is at most this are perturbed.
    """

    def __init__(self, direction: Direction, threshold: float) -> None:
        super().__init__(direction)
        self.threshold = threshold

    def add_to(self, weight: Tensor, out: Tensor, start: int = 0) -> None:
        kernels.perturb(out, weight, self, start, threshold=self.threshold)

    def add_both(self, weight: Tensor, plus: Tensor, minus: Tensor, start: int = 0) -> None:
        kernels.perturb_both(plus, minus, weight, self, start, threshold=self.threshold)

    def add_to_rows(self, table: Tensor, rows: Tensor, out: Tensor) -> None:
        kernels.perturb_rows(out, table, rows, self, threshold=self.threshold)

    def unit_noise(self, weight: Tensor, start: int = 0) -> Tensor:
        return super().unit_noise(weight, start).where(weight.abs() <= self.threshold, 0.0)

    def of_elements(self, weight: Tensor, start: int = 0) -> Tensor:
        """As of any direction; -0.0 for large weights."""
        return super().of_elements(weight, start).where(weight.abs() <= self.threshold, -0.0)


class Mask(Protocol):
    """Which elements of a parameter move, whatever their values are."""

    def at(self, index: Tensor) -> Tensor:
        """Whether elements move, bool, given their indices, int64, both of any shape."""


class PackedMask:
    """A mask that is stored with one bit per element.

    Args:
        bits: uint8, (n / 8,), from :func:`packed`.
    """

    def __init__(self, bits: Tensor) -> None:
        self.bits = bits

    def at(self, index: Tensor) -> Tensor:
        return (self.bits[index >> 3] >> (index & 7).to(torch.uint8)) & 1 == 1


def packed(moves: Tensor) -> Tensor:
    """The bits of a mask, uint8, (n / 8,), given bool, (n,)."""
    bits = torch.zeros(-(-moves.numel() // 8) * 8, dtype=torch.uint8, device=moves.device)
    bits[: moves.numel()] = moves
    places = torch.arange(8, dtype=torch.uint8, device=moves.device)
    return (bits.view(-1, 8) << places).sum(1, dtype=torch.uint8)


class RandomMask:
    """A random mask that is computed by hashing indices, and not stored.

    Args:
        key: int32, (2,).
        density: share of the elements that move.
    """

    def __init__(self, key: Tensor, density: float) -> None:
        self.key = key
        self.below = round((density - 0.5) * 2**32)

    def at(self, index: Tensor) -> Tensor:
        return hash_bits(index.to(torch.int32), self.key) < self.below


class Masked(DerivedDirection):
    """A direction restricted to the elements of a mask; it takes several passes over memory."""

    def __init__(self, direction: Direction, mask: Mask) -> None:
        super().__init__(direction)
        self.mask = mask

    def add_to(self, weight: Tensor, out: Tensor, start: int = 0) -> None:
        super().add_to(weight, out, start)
        self._restore(weight, out, start)

    def add_both(self, weight: Tensor, plus: Tensor, minus: Tensor, start: int = 0) -> None:
        super().add_both(weight, plus, minus, start)
        self._restore(weight, plus, start)
        self._restore(weight, minus, start)

    def add_to_rows(self, table: Tensor, rows: Tensor, out: Tensor) -> None:
        super().add_to_rows(table, rows, out)
        index = rows.long()[:, None] * table.shape[1] + torch.arange(table.shape[1], device=rows.device)
        out.copy_(torch.where(self.mask.at(index), out, table[rows]))

    def unit_noise(self, weight: Tensor, start: int = 0) -> Tensor:
        index = torch.arange(start, start + weight.numel(), device=weight.device)
        return super().unit_noise(weight, start).where(self.mask.at(index), 0.0)

    def of_elements(self, weight: Tensor, start: int = 0) -> Tensor:
        """As of any direction; -0.0 where the mask is False, which changes no sum."""
        index = torch.arange(start, start + weight.numel(), device=weight.device)
        return super().of_elements(weight, start).where(self.mask.at(index), -0.0)

    def _restore(self, weight: Tensor, out: Tensor, start: int) -> None:
        weight, out = weight.view(-1), out.view(-1)
        for part in chunks(weight.numel(), chunk_size(weight)):
            moves = self.mask.at(torch.arange(start + part.start, start + part.stop, device=weight.device))
            out[part].copy_(torch.where(moves, out[part], weight[part].to(out.dtype)))
