"""How the kernels change a diagonal curvature by the codes of the noise (HiZOO)."""

from typing import NamedTuple

from torch import Tensor


class Change(NamedTuple):
    """The change of a curvature H, element by element.

    ``H = clamp(H + H * (shift + sum over queries of square * code**2), floor, ceiling)``

    Attributes:
        shift: the relative change that all elements share.
        squares: the factor ``square`` of each query, (queries,), in the dtype of the arithmetic.
        floor: the least curvature, above 0, so that noise over its root is finite.
        ceiling: the largest curvature, finite, so that noise over its root is never 0.
    """

    shift: float
    squares: Tensor
    floor: float
    ceiling: float
