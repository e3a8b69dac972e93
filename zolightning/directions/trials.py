"""Perturbations for the trials that find where parameters are read: a flipped bit in each element, or no change."""

import torch
from torch import Tensor


class FlippedBit:
    """Changes every element by about 3 % by flipping one bit of its mantissa, which takes no memory to undo."""

    _MANTISSA = {torch.float64: (52, torch.int64), torch.float32: (23, torch.int32)} | {
        torch.bfloat16: (7, torch.int16),
        torch.float16: (10, torch.int16),
    }

    def flip_(self, weight: Tensor) -> None:
        """Flips the bit in place; a second call restores the weight."""
        bits, integer = self._MANTISSA[weight.dtype]
        weight.view(integer).bitwise_xor_(1 << (bits - 5))

    def add_to(self, weight: Tensor, out: Tensor, start: int = 0) -> None:
        out.copy_(weight)
        self.flip_(out)

    def add_to_rows(self, table: Tensor, rows: Tensor, out: Tensor) -> None:
        out.copy_(table[rows])
        self.flip_(out)


class Unchanged:
    """Changes nothing; the parameter is read like a perturbed one: from scratch memory, a large matrix in pieces.

    Products of pieces may round differently from the product of the whole matrix, and losses at the stored weights must
    round as perturbed ones do.
    """

    def add_to(self, weight: Tensor, out: Tensor, start: int = 0) -> None:
        out.copy_(weight)

    def add_to_rows(self, table: Tensor, rows: Tensor, out: Tensor) -> None:
        torch.index_select(table, 0, rows, out=out)
