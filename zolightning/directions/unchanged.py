"""A perturbation by zero, for losses that must round as perturbed ones do."""

import torch
from torch import Tensor


class Unchanged:
    """Changes nothing, but has the parameter read as a perturbed one is: from scratch memory, a large matrix in pieces.

    Products of pieces may round in another way than the product of the whole matrix.
    """

    def add_to(self, weight: Tensor, out: Tensor, start: int = 0) -> None:
        out.copy_(weight)

    def add_to_rows(self, table: Tensor, rows: Tensor, out: Tensor) -> None:
        torch.index_select(table, 0, rows, out=out)
