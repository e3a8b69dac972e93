"""Noise in Triton, with the arithmetic of ``noise.py``, which explains it. Each pair of elements is hashed once.

``QUERIES`` is the number of queries, or 0 for a loop over ``queries``. With ``POPC`` an instruction counts bits, which
the interpreter and AMD's devices do not have; without it masks do.
"""

import triton
import triton.language as tl


@triton.jit
def _popcount(bits):
    return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def _codes(pair, key, RADEMACHER: tl.constexpr, POPC: tl.constexpr):
    """The codes of elements ``2 * pair`` and ``2 * pair + 1``, float32: see ``noise.codes``."""
    key0 = tl.load(key).to(tl.uint32, bitcast=True)
    key1 = tl.load(key + 1).to(tl.uint32, bitcast=True)
    bits = (pair * 0x9E3779B1) ^ key0
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) + key1
    bits = bits * 0x846CA68B
    bits = bits ^ (bits >> 16)
    if RADEMACHER:  # 1.0, whose sign bit is the code's bit
        even, odd = ((bits << 16) & 0x80000000) | 0x3F800000, (bits & 0x80000000) | 0x3F800000
        return even.to(tl.float32, bitcast=True), odd.to(tl.float32, bitcast=True)
    if POPC:
        even, odd = _popcount(bits & 0xFFFF), _popcount(bits >> 16)
    else:
        bits -= (bits >> 1) & 0x55555555
        bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
        bits = (bits + (bits >> 4)) & 0x0F0F0F0F
        bits = (bits + (bits >> 8)) & 0x001F001F
        even, odd = bits & 0xFFFF, bits >> 16
    # 0x4B000000 is 2.0**23, whose last bits count ones: exact, and cheaper than a conversion of integers.
    even, odd = (even | 0x4B000000).to(tl.float32, bitcast=True), (odd | 0x4B000000).to(tl.float32, bitcast=True)
    return even - 8388616.0, odd - 8388616.0


@triton.jit
def noise_of(
    pair,
    keys,
    coefficients,
    queries,
    QUERIES: tl.constexpr,
    RADEMACHER: tl.constexpr,
    POPC: tl.constexpr,
    squares=None,
    shift=None,
):
    """The noise of the elements of consecutive pairs, see ``Noise.at``, and ``shift + sum(square * code**2)``.

    Without `squares` the second result is the noise again.
    """
    even, odd = _codes(pair, keys, RADEMACHER, POPC)
    even_change, odd_change = even, odd
    if squares is not None:
        square = tl.load(squares)
        even_change, odd_change = shift + square * (even * even), shift + square * (odd * odd)
    coefficient = tl.load(coefficients)
    even, odd = coefficient * even, coefficient * odd
    if QUERIES > 0:
        for query in tl.static_range(1, QUERIES):
            coefficient = tl.load(coefficients + query)
            next_even, next_odd = _codes(pair, keys + 2 * query, RADEMACHER, POPC)
            even, odd = even + coefficient * next_even, odd + coefficient * next_odd
            if squares is not None:
                square = tl.load(squares + query)
                even_change += square * (next_even * next_even)
                odd_change += square * (next_odd * next_odd)
    else:
        query = 1
        while query < queries:  # a range would need a number, which the interpreter of Triton 3.6 has not
            coefficient = tl.load(coefficients + query)
            next_even, next_odd = _codes(pair, keys + 2 * query, RADEMACHER, POPC)
            even, odd = even + coefficient * next_even, odd + coefficient * next_odd
            if squares is not None:
                square = tl.load(squares + query)
                even_change += square * (next_even * next_even)
                odd_change += square * (next_odd * next_odd)
            query += 1
    noise = tl.interleave(even, odd)
    if squares is None:
        return noise, noise
    return noise, tl.interleave(even_change, odd_change)


@triton.jit
def pairs_from(first, BLOCK: tl.constexpr):
    """The indices of the pairs of elements in a block that begins with element `first`, int64, even; wraps at 2**31."""
    return ((first >> 1).to(tl.uint32) + tl.arange(0, BLOCK // 2).to(tl.uint32)) & 0x7FFFFFFF
