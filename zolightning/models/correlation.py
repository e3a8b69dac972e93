"""Pearson's correlation of predicted numbers with the right ones."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class Pearson(Metric):
    """The correlation over all rows, in float32: two numbers a row are kept until the end of a validation.

    torchmetrics' own keeps sums instead, which become bfloat16 with the module under ``bf16-true``: too coarse for
    predictions that differ little, as those of a new head do, and NaN for some.
    """

    higher_is_better = True
    full_state_update = False
    said: list[Tensor]
    right: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("said", [], dist_reduce_fx="cat")
        self.add_state("right", [], dist_reduce_fx="cat")

    def update(self, said: Tensor, right: Tensor) -> None:
        self.said.append(said.float())
        self.right.append(right.float())

    def compute(self) -> Tensor:
        return torch.corrcoef(torch.stack([dim_zero_cat(self.said), dim_zero_cat(self.right)]))[0, 1]
