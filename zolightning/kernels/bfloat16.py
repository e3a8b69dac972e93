"""A bf16 weight and its low word: together one fp32 number.

A bf16 number is the upper half of an fp32 number. With the lower half kept beside it (its *low word*, signed, so
that the upper half is the rounded value), the pair is that fp32 number.
"""

import torch
from torch import Tensor


def read_split(weight: Tensor, low: Tensor) -> Tensor:
    """The fp32 numbers whose rounded upper half is `weight` (bf16) and whose rest is `low` (int16), of one shape.

    A zero that somebody else has written over a weight stays next to zero: its old low word, if below 0, does not
    count, where it would make the bits of a NaN.
    """
    high, rest = weight.view(torch.int16).to(torch.int32), low.to(torch.int32)
    rest = torch.where((high & 0x7FFF) == 0, rest.clamp_min(0), rest)
    return ((high << 16) + rest).view(torch.float32)


def write_split(weight: Tensor, low: Tensor, value: Tensor) -> None:
    """Stores fp32 numbers as `weight` (bf16) and `low` (int16), losing nothing."""
    bits = value.view(torch.int32)
    high = (bits + 0x8000) >> 16
    weight.copy_(high.to(torch.int16).view(torch.bfloat16))
    low.copy_((bits - (high << 16)).to(torch.int16))
