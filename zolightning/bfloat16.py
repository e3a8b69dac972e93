"""Loops over bf16 weights two at a time.

Compilers vectorise 32-bit integer loops and stumble over 16-bit ones, so two neighbouring bf16 numbers are read
as one int32 (the even element in its lower half): half again to twice as fast as element by element, and the same
bits.

A bf16 number is the upper half of an fp32 number. With the lower half kept beside it (its *low word*, signed, so
that the upper half is the rounded value) the pair is the fp32 number itself.
"""

import torch
from torch import Tensor

from zolightning.kernels import chunks, kernel
from zolightning.noise import NoiseKind, noise_sum, noise_sum_pairs, start_of

_LOWER, _UPPER = 0xFFFF, -0x10000


def _pair_index(pairs: Tensor, start: Tensor) -> Tensor:
    return torch.arange(pairs.numel(), dtype=torch.int32, device=pairs.device) + start


def _join(even: Tensor, odd: Tensor) -> Tensor:
    return (even & _LOWER) | (odd << 16)


def _rounded(value: Tensor) -> Tensor:
    bits = value.view(torch.int32)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even, as a cast does


def _perturb_pairs(
    out: Tensor, weight: Tensor, keys: Tensor, coefficients: Tensor, start: Tensor, kind: NoiseKind
) -> None:
    even, odd = noise_sum_pairs(_pair_index(weight, start), keys, coefficients, kind)
    even = (weight << 16).view(torch.float32) + even
    odd = (weight & _UPPER).view(torch.float32) + odd
    out.copy_(_join(_rounded(even), _rounded(odd)))


def _add_noise_pairs(
    weight: Tensor,
    low: Tensor,
    keys: Tensor,
    coefficients: Tensor,
    start: Tensor,
    decay: Tensor,
    kind: NoiseKind,
) -> None:
    even, odd = noise_sum_pairs(_pair_index(weight, start), keys, coefficients, kind)
    even = decay * ((weight << 16) + ((low << 16) >> 16)).view(torch.float32) + even
    odd = decay * ((weight & _UPPER) + (low >> 16)).view(torch.float32) + odd
    even_high, even_low = split_bits(even)
    odd_high, odd_low = split_bits(odd)
    low.copy_(_join(even_low, odd_low))
    weight.copy_(_join(even_high, odd_high))


def split_bits(value: Tensor) -> tuple[Tensor, Tensor]:
    """The upper half of fp32 numbers, rounded, and the signed rest, both as int32."""
    bits = value.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high, bits - (high << 16)


def read_split(weight: Tensor, low: Tensor) -> Tensor:
    """The fp32 numbers whose rounded upper half is `weight` (bf16) and whose rest is `low` (int16)."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


def write_split(weight: Tensor, low: Tensor, value: Tensor) -> None:
    """Stores fp32 numbers as `weight` (bf16) and `low` (int16), losing nothing."""
    high, rest = split_bits(value)
    weight.copy_(high.to(torch.int16).view(torch.bfloat16))
    low.copy_(rest.to(torch.int16))


def perturb(out: Tensor, weight: Tensor, keys: Tensor, coefficients: Tensor, start: int, kind: NoiseKind) -> None:
    """``out = weight + noise`` for flat, contiguous bf16 tensors of even length and even `start`."""
    pairs, out_pairs = weight.view(torch.int32), out.view(torch.int32)
    run, size = kernel(_perturb_pairs, pairs)
    for part in chunks(pairs.numel(), size):
        first = start_of(start // 2 + part.start, weight.device)
        run(out_pairs[part], pairs[part], keys, coefficients, first, kind)


def add_noise(weight: Tensor, low: Tensor, keys: Tensor, coefficients: Tensor, decay: Tensor, kind: NoiseKind) -> None:
    """``weight = decay * weight + noise`` for flat bf16 weights with their low words, in fp32, in place."""
    even = weight.numel() // 2 * 2
    pairs, low_pairs = weight[:even].view(torch.int32), low[:even].view(torch.int32)
    run, size = kernel(_add_noise_pairs, pairs)
    for part in chunks(pairs.numel(), size):
        first = start_of(part.start, weight.device)
        run(pairs[part], low_pairs[part], keys, coefficients, first, decay, kind)
    if even < weight.numel():
        index = torch.full((1,), even, dtype=torch.int32, device=weight.device)
        value = decay * read_split(weight[even:], low[even:]) + noise_sum(index, keys, coefficients, kind)
        write_split(weight[even:], low[even:], value)
