"""Correlations of predicted numbers with the right ones."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class Pearson(Metric):
    """Pearson's correlation over all rows, in float32: two numbers a row are kept until the end of a validation.

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


class Spearman(Pearson):
    """Spearman's correlation, Pearson's of the ranks; equal numbers share the mean of theirs.

    torchmetrics' own keeps the numbers in bfloat16 under ``bf16-true``, in which many different ones become equal.
    """

    def compute(self) -> Tensor:
        return torch.corrcoef(torch.stack([_ranks(dim_zero_cat(self.said)), _ranks(dim_zero_cat(self.right))]))[0, 1]


def _ranks(numbers: Tensor) -> Tensor:
    """The rank of each of N numbers, from 1 to N, (N,), float64."""
    _, place, counts = numbers.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0) - (counts.double() - 1) / 2
    return ranks[place]
