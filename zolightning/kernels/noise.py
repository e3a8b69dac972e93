"""Counter-based noise: every direction is a pure function of integers, so none is ever stored.

An element of a direction depends on (run seed, step, query, parameter name, element index) and on nothing
else: not on the device, dtype, process count, shard, order of parameters or torch's generators. Two neighbouring
elements share one 32-bit hash of their pair's index and a 64-bit key; each gets 16 of its bits, which become a small
integer, its *code*:

* ``gaussian``: number of set bits minus 8, times 1/2. Mean 0, variance 1, skewness 0, excess kurtosis -1/8: a
  binomial with 17 values, close enough to a normal distribution for SPSA, where only the first moments count, and free
  of logarithms and cosines, whose last bits differ between devices.
* ``rademacher``: the top bit, +1 or -1.

Coefficients are rounded to 20 significant bits. A code needs at most 4, so ``coefficient * code`` is exact in
fp32, and a compiler that contracts ``a * b + c`` into one fused operation gets the same bits as one that does not.

Everything here is element-wise integer arithmetic in torch, so that a loop that uses it can be compiled for a GPU and
also runs eagerly (:mod:`zolightning.kernels.compiled`); CPUs have the same loops in C
(:mod:`zolightning.kernels.native`). All give the same bits.
"""

import functools
import hashlib
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

NoiseKind = Literal["gaussian", "rademacher"]
NOISE_KINDS: tuple[NoiseKind, ...] = get_args(NoiseKind)
CODE_SCALE: dict[str, float] = {"gaussian": 0.5, "rademacher": 1.0}
MAX_ELEMENTS = 2**32  # the counter is 32 bits wide

Key = tuple[int, int]


@dataclass(eq=False)
class Noise:
    """A sum over queries of coefficient times code, as a function of the index of an element.

    Args:
        keys: int32, (queries, 2), each from :func:`key`.
        coefficients: (queries,), each from :func:`coefficient`; float32, or float64 for double-precision weights: the
            dtype of the arithmetic.
        kind: distribution of the codes.
    """

    keys: Tensor
    coefficients: Tensor
    kind: NoiseKind

    def __neg__(self) -> "Noise":
        return Noise(self.keys, -self.coefficients, self.kind)

    def at(self, index: Tensor) -> Tensor:
        """The sums of elements, given their indices, int32, of any shape."""
        keys, coefficients, dtype = self.keys, self.coefficients, self.coefficients.dtype
        total = coefficients[0] * codes(index, keys[0], self.kind).to(dtype)
        for query in range(1, keys.shape[0]):
            total = total + coefficients[query] * codes(index, keys[query], self.kind).to(dtype)
        return total


def key(seed: int, step: int, query: int, name: str) -> Key:
    """The two signed 32-bit words that select one direction of one parameter."""
    return keys_of([name], seed, step, query)[0]


def keys_of(names: Iterable[str], seed: int, step: int, query: int) -> list[Key]:
    """The :func:`key` of each of some parameters."""
    run = struct.pack("<qqq", seed, step, query)
    digests = [hashlib.blake2b(run + name.encode(), digest_size=8).digest() for name in names]
    return list(struct.iter_unpack("<ii", b"".join(digests)))


def coefficient(value: float, kind: NoiseKind) -> float:
    """`value` times the scale of the codes, rounded to 20 significant bits (see the module's docstring)."""
    mantissa, exponent = math.frexp(value * CODE_SCALE[kind])
    return math.ldexp(round(mantissa * 2**20), exponent - 20)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical right shift of int32, which torch only shifts arithmetically."""
    return (bits >> count) & ((1 << (32 - count)) - 1)


def hash_bits(index: Tensor, key: Tensor) -> Tensor:
    """32 well-mixed bits for every index, int32, of the shape of `index`.

    Two multiply-xorshift rounds with the constants of C. Wellons' lowbias32; the second key word enters between them;
    otherwise two keys would give permutations of one sequence. Neighbouring indices differ in few bits, which two
    rounds do not quite hide (TestU01's SmallCrush finds them): multiplied by an odd constant, 2^32 over the golden
    ratio, they differ in many.

    Args:
        index: int32 indices, any shape.
        key: int32, shape (2,).
    """
    bits = (index * -0x61C8864F) ^ key[0]  # 0x9E3779B1 as int32
    bits = (bits ^ _shift_right(bits, 16)) * 0x7FEB352D
    bits = (bits ^ _shift_right(bits, 15)) + key[1]
    bits = bits * -0x7B935975  # 0x846CA68B as int32
    return bits ^ _shift_right(bits, 16)


def codes(index: Tensor, key: Tensor, kind: NoiseKind) -> Tensor:
    """The integer codes of a direction, int32, of the shape of `index`."""
    if index.device.type == "meta":  # used to find how many bytes a method needs
        return torch.empty_like(index)
    bits = hash_bits(_shift_right(index, 1), key)
    shift = (index & 1) << 4  # an odd element has the upper half of its pair's bits
    if kind == "rademacher":
        return 1 - 2 * ((bits >> (shift + 15)) & 1)
    # Bits counted in twos, fours, eights, sixteens; the masks make arithmetic shifts safe.
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    bits = (bits + (bits >> 8)) & 0x001F001F
    return ((bits >> shift) & 0xFFFF) - 8


def counter(like: Tensor, start: Tensor) -> Tensor:
    """The int32 indices of the elements of a flat tensor whose first element has index `start`."""
    return torch.arange(like.numel(), dtype=torch.int32, device=like.device) + start


@functools.lru_cache(maxsize=1024)
def start_of(start: int, device: torch.device) -> Tensor:
    """The int32 the counter begins with: it wraps, as the index does."""
    return torch.full((), (start + 2**31) % 2**32 - 2**31, dtype=torch.int32, device=device)


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """Copies a small table from the host to a device, without waiting for the device."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)
