"""How a diagonal curvature changes in a step: by what the codes of the noise say, as they are made."""

from typing import NamedTuple

from torch import Tensor


class Change(NamedTuple):
    """The change of a curvature H, element by element.

    ``H = clamp(H + H * (shift + sum over queries of square * code**2), floor, ceiling)``

    Attributes:
        shift: what all elements change by, relative to themselves.
        squares: of each query, (queries,), in the dtype of the arithmetic.
        floor: above 0, so that noise over the root of the curvature is finite.
        ceiling: finite, so that it is never 0 for good.
    """

    shift: float
    squares: Tensor
    floor: float
    ceiling: float
