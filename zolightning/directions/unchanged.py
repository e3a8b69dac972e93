"""No change of a parameter, which is read as a perturbed one is."""

import torch
from torch import Tensor


class Unchanged:
    """Hands functions copies of a parameter, a large matrix in pieces, so that products round as perturbed ones do."""

    def add_to(self, weight: Tensor, out: Tensor, start: int = 0) -> None:
        out.copy_(weight)

    def add_to_rows(self, table: Tensor, rows: Tensor, out: Tensor) -> None:
        torch.index_select(table, 0, rows, out=out)
