"""The coefficients of a step of Adam in the kernels, which update the moments as they draw the noise."""

from typing import NamedTuple


class AdamStep(NamedTuple):
    """One step of the moments m and v by a gradient g (Kingma and Ba, arXiv 1412.6980, algorithm 1).

    ``m = keep_mean * m + take_mean * g`` and ``v = keep_square * v + (take_square * g) * g``, both beginning with 0;
    then a weight moves by ``scale * ((m / mean_correction) / (sqrt(v / square_correction) + eps))``. Every operation is
    rounded by itself, and correctly, roots and quotients too: the same bits on every device.
    """

    keep_mean: float
    take_mean: float
    keep_square: float
    take_square: float
    mean_correction: float
    square_correction: float
    eps: float
    scale: float


def adam_step(betas: tuple[float, float], step: int, eps: float, scale: float) -> AdamStep:
    """Step number `step`, from 1."""
    first, second = betas
    return AdamStep(first, 1 - first, second, 1 - second, 1 - first**step, 1 - second**step, eps, scale)
