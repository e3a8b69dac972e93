"""Samples of large tensors, for curves."""

from torch import Tensor


def strided(tensor: Tensor, most: int = 2**14) -> Tensor:
    """At most so many elements of a tensor, evenly spaced, (k,)."""
    flat = tensor.flatten()
    return flat[:: max(-(-flat.numel() // most), 1)]
