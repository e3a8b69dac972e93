"""A bf16 weight together with the bits that bf16 rounds away: an fp32 number, or most of one.

A bf16 number is the upper half of an fp32 number. With the lower half kept alongside (its *low word*, int16, signed, so
that the upper half is the rounded value), the pair is that fp32 number. With a *low byte* (int8) it is that number
rounded to 24 bits, to nearest with ties to even: 16 significant bits where fp32 has 24 and bf16 has 8.
"""

import torch
from torch import Tensor


def read_split(weight: Tensor, low: Tensor) -> Tensor:
    """The fp32 numbers whose upper half, rounded, is `weight` (bf16) and whose extra bits are `low` (int16 or int8).

    If other code has overwritten a weight with zero, its old extra bits stay, which makes it a number next to zero;
    those below 0 are ignored, because the number would be a NaN.
    """
    high, extra_bits = weight.view(torch.int16).to(torch.int32), low.to(torch.int32)
    extra_bits = torch.where((high & 0x7FFF) == 0, extra_bits.clamp_min(0), extra_bits)
    return ((high << 16) + (extra_bits << _unused_bits(low))).view(torch.float32)


def write_split(weight: Tensor, low: Tensor, value: Tensor) -> None:
    """Stores fp32 numbers as `weight` (bf16) and `low`: int16 loses nothing, int8 rounds to 24 bits."""
    bits = torch.where(value.isnan(), 0x7FC00000, value.view(torch.int32))  # other NaNs could be rounded to numbers
    unused = _unused_bits(low)
    if unused:
        bits = (bits + 0x7F + ((bits >> 8) & 1)) & -0x100
    high = (bits + 0x8000) >> 16
    weight.copy_(high.to(torch.int16).view(torch.bfloat16))
    low.copy_(((bits - (high << 16)) >> unused).to(low.dtype))


def _unused_bits(low: Tensor) -> int:
    """How many of an fp32 number's 32 bits are in neither half."""
    return 8 if low.dtype == torch.int8 else 0
