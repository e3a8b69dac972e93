"""How a kernel in Triton reads and writes weights: in fp32, with their extra bits, as ``bfloat16.py`` explains it."""

import triton
import triton.language as tl


@triton.jit
def wide(value, INTERPRETED: tl.constexpr):
    """fp32; the interpreter flushes subnormal bf16 numbers."""
    if INTERPRETED and value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def rounded(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 to `dtype`, to nearest, ties to even; the interpreter truncates to bf16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(value == value, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def shaped(noise, value, curvature, threshold, at, inside):
    """The noise that is added to a stored value: over the root of a curvature, or only where the value is small."""
    if curvature is not None:
        return tl.div_rn(noise, tl.sqrt_rn(tl.load(curvature + at, mask=inside, other=1.0)))
    if threshold is not None:
        return tl.where(tl.abs(value) <= threshold, noise, -0.0)  # adding -0.0 changes no number
    return noise


@triton.jit
def update(
    weight, extra_bits, decay, delta, at, inside, DECAYS: tl.constexpr, INTERPRETED: tl.constexpr, threshold=None
):
    """``weight = decay * weight + delta`` for the elements `at`; `threshold` leaves out delta for larger weights.

    Without `extra_bits` the sum is rounded to the weight's dtype. If these are low words or low bytes, they take the
    bits that are rounded away; if they are an fp32 master, the sum is that of the master.
    """
    stored = tl.load(weight + at, mask=inside)
    delta = shaped(delta, wide(stored, INTERPRETED), None, threshold, at, inside)
    if extra_bits is None:
        value = wide(stored, INTERPRETED)
    elif extra_bits.dtype.element_ty == tl.float32:
        value = tl.load(extra_bits + at, mask=inside)
        value = tl.where(stored != value.to(stored.dtype), wide(stored, INTERPRETED), value)
    else:
        # bfloat16.read_split: a zero that other code has written has no extra bits below it.
        UNUSED: tl.constexpr = 8 if extra_bits.dtype.element_ty == tl.int8 else 0
        high = stored.to(tl.uint16, bitcast=True).to(tl.uint32)
        low = tl.load(extra_bits + at, mask=inside).to(tl.int32) << UNUSED
        low = tl.where((high & 0x7FFF) == 0, tl.maximum(low, 0), low)
        value = ((high << 16) + low.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    if DECAYS:
        value = decay * value
    value += delta
    if extra_bits is None:
        tl.store(weight + at, rounded(value, weight.dtype.element_ty, INTERPRETED), mask=inside)
    elif extra_bits.dtype.element_ty == tl.float32:
        tl.store(extra_bits + at, value, mask=inside)
        tl.store(weight + at, rounded(value, weight.dtype.element_ty, INTERPRETED), mask=inside)
    else:
        bits = tl.where(value == value, value.to(tl.uint32, bitcast=True), 0x7FC00000)
        if UNUSED > 0:
            bits = (bits + 0x7F + ((bits >> 8) & 1)) & 0xFFFFFF00
        high = (bits + 0x8000) >> 16
        low = (bits - (high << 16)).to(tl.int32, bitcast=True) >> UNUSED
        tl.store(weight + at, high.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
        tl.store(extra_bits + at, low.to(extra_bits.dtype.element_ty), mask=inside)
