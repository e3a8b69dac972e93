"""Rounds half-precision weights stochastically, before the extra bits that are kept for them are dropped."""

import math

import torch
from torch import Tensor

from zolightning.kernels.compiled import chunk_size, chunks
from zolightning.kernels.noise import Key, counter, hash_bits, on_device, start_of
from zolightning.optim.precision import State, UpdatePrecision, add_tensor


def round_stochastically(
    weight: Tensor, extra_bits: State, precision: UpdatePrecision, key: Key, first: int = 0
) -> None:
    """Rounds a half-precision weight to its dtype stochastically, so that its extra bits can be dropped without bias.

    Each element becomes one of the two nearest numbers, with probabilities that make the unrounded value its mean. The
    random numbers are those of `key`, from `first` on, the index of the weight's first element in the whole parameter.
    """
    flat, words = weight.view(-1), on_device(torch.tensor(key, dtype=torch.int32), weight.device)
    for part in chunks(flat.numel(), chunk_size(flat)):
        add_tensor(weight, extra_bits, _dither(flat[part], first + part.start, words), precision, start=part.start)


def _dither(weight: Tensor, start: int, key: Tensor) -> Tensor:
    """Uniform random numbers within half a unit in the last place of each weight, (n,), float32."""
    info = torch.finfo(weight.dtype)
    exponents = torch.frexp(weight.float()).exponent.clamp_min(math.frexp(info.tiny)[1])
    spacings = torch.ldexp((weight != 0).float() * info.eps, exponents - 1)
    index = counter(weight, start_of(start, weight.device))
    bits = hash_bits(index, key)
    return spacings * ((bits >> 16).float() + 0.5) / 2**16
