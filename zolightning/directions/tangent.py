"""A direction that a loss is differentiated along, instead of evaluated at a step in it."""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from zolightning.directions.perturbation import Perturbation


class Tangent:
    """Makes a parameter a dual number: what is computed from it carries its derivative along a direction.

    In the place of a perturbation, where one level of :mod:`torch.autograd.forward_ad` is open. Memory is that of the
    parameter, while it is read.

    Args:
        direction: of unit variance, the same for any weight.

    Attributes:
        is_hidden: whether the parameter was read, if at all, where it could not be exchanged, so that what was computed
            from it carries no derivative.
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
