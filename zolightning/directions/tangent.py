"""Directions for forward-mode differentiation."""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from zolightning.directions.perturbation import Perturbation


class Tangent:
    """Makes a parameter a dual number, so that what is computed from it carries its derivative along a direction.

    It is used instead of a perturbation, within a level of :mod:`torch.autograd.forward_ad`. It takes as much memory
    as the parameter while the parameter is read.

    Args:
        direction: the direction, of unit variance; it must not depend on the weight.

    Attributes:
        is_hidden: whether the parameter was only read where it could not be replaced by a dual number, so that the
            derivative is lost.
    """

    def __init__(self, direction: Perturbation) -> None:
        self.direction = direction
        self.is_hidden = False

    def dual(self, weight: Tensor) -> Tensor:
        """The stored `weight` and, in its dtype, the direction."""
        primal = weight.detach()
        zeros = torch.zeros_like(primal, memory_format=torch.contiguous_format)
        tangent = torch.empty_like(zeros)
        self.direction.add_to(zeros, tangent)
        return forward_ad.make_dual(primal, tangent)

    def add_to(self, weight: Tensor, out: Tensor) -> None:
        self.is_hidden = True
        out.copy_(weight)

    def add_to_rows(self, table: Tensor, rows: Tensor, out: Tensor) -> None:
        raise NotImplementedError("rows of a dual table are looked up by torch")
