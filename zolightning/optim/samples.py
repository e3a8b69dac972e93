"""Samples of large tensors, for curves."""

from torch import Tensor


def strided(tensor: Tensor, most: int = 2**14) -> Tensor:
    """At most `most` evenly spaced elements of a tensor, (k,)."""
    flat = tensor.flatten()
    return flat[:: max(-(-flat.numel() // most), 1)]
