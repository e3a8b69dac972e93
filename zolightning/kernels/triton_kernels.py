"""Kernels in Triton, with the arithmetic of ``torch_loops.py`` and ``bfloat16.py``, which explain it.

A program makes the noise of ``BLOCK`` neighbouring elements (``triton_noise.py``), and reads and writes every tensor
once. ``start``, even, is the index of a tensor's first element, and ``numel`` the number of elements. ``INTERPRETED``
says that Triton's interpreter runs it, which rounds differently.

One launch may work on several tensors of one dtype. ``tensors``, int64, then has a row for each of them: its address,
that of a second tensor, the number of elements, the offset of its keys in ``keys``, and the addresses of further
tensors or the bits of a threshold. ``chunks``, int32, has a row for every ``CHUNK`` programs: the index of a tensor,
and of a chunk in it. The other arguments of a kernel are those of the first tensor, for their types. All tensors must
be aligned to 16 bytes and have multiples of 16 elements; otherwise a thread would read one element at a time.
"""

import triton
import triton.language as tl

from zolightning.kernels.triton_noise import noise_of, pairs_from


@triton.jit
def _shaped(noise, value, curvature, threshold, at, inside):
    """The noise that is added to a stored value: over the root of a curvature, or only where the value is small."""
    if curvature is not None:
        return tl.div_rn(noise, tl.sqrt_rn(tl.load(curvature + at, mask=inside, other=1.0)))
    if threshold is not None:
        return tl.where(tl.abs(value) <= threshold, noise, -0.0)  # adding -0.0 changes no number
    return noise


@triton.jit
def _place(tensors, chunks, CHUNK: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """The row in `tensors` of the tensor that this program works on, and the first element that it works on there."""
    program = tl.program_id(0)
    chunk = chunks + program // CHUNK * 2
    row = tensors + tl.load(chunk).to(tl.int64) * COLUMNS
    return row, (tl.load(chunk + 1).to(tl.int64) * CHUNK + program % CHUNK) * BLOCK


@triton.jit
def _address(entry, like):
    """The pointer stored in an entry of `tensors`, with the type of the pointer `like`."""
    return tl.multiple_of(tl.load(entry).to(like.dtype), 16)


@triton.jit
def _wide(value, INTERPRETED: tl.constexpr):
    """fp32; the interpreter flushes subnormal bf16 numbers."""
    if INTERPRETED and value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def _rounded(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 to `dtype`, to nearest, ties to even; the interpreter truncates to bf16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(value == value, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


# No new compilation for other values of `queries` and `start`, nor for other alignments of keys and coefficients.
@triton.jit(do_not_specialize=["queries", "start"], do_not_specialize_on_alignment=["keys", "coefficients"])
def perturb(
    plus,
    weight,
    tensors,
    chunks,
    minus,
    curvature,
    threshold,
    keys,
    coefficients,
    queries,
    start,
    numel,
    QUERIES: tl.constexpr,
    RADEMACHER: tl.constexpr,
    POPC: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``plus = weight + noise`` and, if there is a `minus`, ``minus = weight - noise``; a weight of None is zeros."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if tensors is not None:
        row, first = _place(tensors, chunks, CHUNK, BLOCK, 5)
        plus, numel, keys = _address(row, plus), tl.multiple_of(tl.load(row + 2), 16), keys + tl.load(row + 3)
        if weight is not None:
            weight = _address(row + 1, weight)
        if curvature is not None:
            curvature = _address(row + 4, curvature)
    at = first + tl.arange(0, BLOCK)
    inside = at < numel
    noise, _ = noise_of(pairs_from(start + first, BLOCK), keys, coefficients, queries, QUERIES, RADEMACHER, POPC)
    if weight is not None:
        value = _wide(tl.load(weight + at, mask=inside), INTERPRETED)
    else:
        value = tl.zeros((BLOCK,), tl.float32)
    shaped = _shaped(noise, value, curvature, threshold, at, inside)
    tl.store(plus + at, _rounded(value + shaped, plus.dtype.element_ty, INTERPRETED), mask=inside)
    if minus is not None:
        negated = noise * -1.0  # on a device Triton's unary minus is 0 - x, which does not turn 0 into -0
        shaped = _shaped(negated, value, curvature, threshold, at, inside)
        tl.store(minus + at, _rounded(value + shaped, minus.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit(do_not_specialize=["queries", "count"], do_not_specialize_on_alignment=["rows", "keys", "coefficients"])
def perturb_rows(
    out,
    table,
    rows,
    curvature,
    threshold,
    keys,
    coefficients,
    queries,
    count,
    columns,
    QUERIES: tl.constexpr,
    RADEMACHER: tl.constexpr,
    POPC: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = (table + noise)[rows]``; a program for each row and block of columns."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    inside = column < columns
    index = row * columns
    noise, _ = noise_of(pairs_from(index + first, BLOCK), keys, coefficients, queries, QUERIES, RADEMACHER, POPC)
    # A row that does not exist is not read: it becomes NaN, and so does the loss.
    rows_of = tl.broadcast_to(row, (BLOCK,))
    exists = inside & (rows_of >= 0) & (rows_of < count)
    value = _wide(tl.load(table + index + column, mask=exists, other=float("nan")), INTERPRETED)
    at = place * columns + column
    shaped = _shaped(noise, value, curvature, threshold, at, inside)
    tl.store(out + at, _rounded(value + shaped, out.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit
def _update(
    weight, extra_bits, decay, delta, at, inside, DECAYS: tl.constexpr, INTERPRETED: tl.constexpr, threshold=None
):
    """``weight = decay * weight + delta`` for the elements `at`; `threshold` leaves out delta for larger weights.

    Without `extra_bits` the sum is rounded to the weight's dtype. If these are low words or low bytes, they take the
    bits that are rounded away; if they are an fp32 master, the sum is that of the master.
    """
    stored = tl.load(weight + at, mask=inside)
    delta = _shaped(delta, _wide(stored, INTERPRETED), None, threshold, at, inside)
    if extra_bits is None:
        value = _wide(stored, INTERPRETED)
    elif extra_bits.dtype.element_ty == tl.float32:
        value = tl.load(extra_bits + at, mask=inside)
        value = tl.where(stored != value.to(stored.dtype), _wide(stored, INTERPRETED), value)
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
        tl.store(weight + at, _rounded(value, weight.dtype.element_ty, INTERPRETED), mask=inside)
    elif extra_bits.dtype.element_ty == tl.float32:
        tl.store(extra_bits + at, value, mask=inside)
        tl.store(weight + at, _rounded(value, weight.dtype.element_ty, INTERPRETED), mask=inside)
    else:
        bits = tl.where(value == value, value.to(tl.uint32, bitcast=True), 0x7FC00000)
        if UNUSED > 0:
            bits = (bits + 0x7F + ((bits >> 8) & 1)) & 0xFFFFFF00
        high = (bits + 0x8000) >> 16
        low = (bits - (high << 16)).to(tl.int32, bitcast=True) >> UNUSED
        tl.store(weight + at, high.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
        tl.store(extra_bits + at, low.to(extra_bits.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["queries", "start"], do_not_specialize_on_alignment=["keys", "coefficients"])
def add(
    weight,
    extra_bits,
    tensors,
    chunks,
    decay,
    threshold,
    keys,
    coefficients,
    queries,
    start,
    numel,
    DECAYS: tl.constexpr,
    QUERIES: tl.constexpr,
    RADEMACHER: tl.constexpr,
    POPC: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if tensors is not None:
        row, first = _place(tensors, chunks, CHUNK, BLOCK, 4 if threshold is None else 5)
        weight = _address(row, weight)
        if extra_bits is not None:
            extra_bits = _address(row + 1, extra_bits)
        numel, keys = tl.multiple_of(tl.load(row + 2), 16), keys + tl.load(row + 3)
        if threshold is not None:
            threshold = tl.load(row + 4).to(tl.uint32).to(tl.float32, bitcast=True)
    at = first + tl.arange(0, BLOCK)
    noise, _ = noise_of(pairs_from(start + first, BLOCK), keys, coefficients, queries, QUERIES, RADEMACHER, POPC)
    _update(weight, extra_bits, decay, noise, at, at < numel, DECAYS, INTERPRETED, threshold)


@triton.jit(
    do_not_specialize=["shift", "floor", "ceiling", "queries", "start"],
    do_not_specialize_on_alignment=["keys", "coefficients", "squares"],
)
def add_curved(
    weight,
    extra_bits,
    tensors,
    chunks,
    decay,
    curvature,
    shift,
    squares,
    floor,
    ceiling,
    keys,
    coefficients,
    queries,
    start,
    numel,
    DECAYS: tl.constexpr,
    QUERIES: tl.constexpr,
    RADEMACHER: tl.constexpr,
    POPC: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Changes a curvature, then ``weight = decay * weight + noise / sqrt(curvature)``, unless the weight is None."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if tensors is not None:
        row, first = _place(tensors, chunks, CHUNK, BLOCK, 5)
        weight = _address(row, weight)
        if extra_bits is not None:
            extra_bits = _address(row + 1, extra_bits)
        numel, keys = tl.multiple_of(tl.load(row + 2), 16), keys + tl.load(row + 3)
        curvature = _address(row + 4, curvature)
    at = first + tl.arange(0, BLOCK)
    inside = at < numel
    pairs = pairs_from(start + first, BLOCK)
    noise, change = noise_of(pairs, keys, coefficients, queries, QUERIES, RADEMACHER, POPC, squares, shift)
    curved = tl.load(curvature + at, mask=inside, other=1.0)
    curved = tl.minimum(tl.maximum(curved + curved * change, floor), ceiling)
    tl.store(curvature + at, curved, mask=inside)
    if weight is not None:
        _update(weight, extra_bits, decay, tl.div_rn(noise, tl.sqrt_rn(curved)), at, inside, DECAYS, INTERPRETED)


_NUMBERS_OF_ADAM = ["keep_mean", "take_mean", "keep_square", "take_square", "mean_correction", "square_correction"]


@triton.jit(
    do_not_specialize=[*_NUMBERS_OF_ADAM, "eps", "scale", "queries", "start"],
    do_not_specialize_on_alignment=["keys", "coefficients"],
)
def add_adam(
    weight,
    extra_bits,
    tensors,
    chunks,
    decay,
    mean,
    square,
    keep_mean,
    take_mean,
    keep_square,
    take_square,
    mean_correction,
    square_correction,
    eps,
    scale,
    keys,
    coefficients,
    queries,
    start,
    numel,
    DECAYS: tl.constexpr,
    QUERIES: tl.constexpr,
    RADEMACHER: tl.constexpr,
    POPC: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if tensors is not None:
        row, first = _place(tensors, chunks, CHUNK, BLOCK, 6)
        weight = _address(row, weight)
        if extra_bits is not None:
            extra_bits = _address(row + 1, extra_bits)
        numel, keys = tl.multiple_of(tl.load(row + 2), 16), keys + tl.load(row + 3)
        mean, square = _address(row + 4, mean), _address(row + 5, square)
    at = first + tl.arange(0, BLOCK)
    inside = at < numel
    gradient, _ = noise_of(pairs_from(start + first, BLOCK), keys, coefficients, queries, QUERIES, RADEMACHER, POPC)
    m = keep_mean * tl.load(mean + at, mask=inside) + take_mean * gradient
    v = keep_square * tl.load(square + at, mask=inside) + (take_square * gradient) * gradient
    tl.store(mean + at, m, mask=inside)
    tl.store(square + at, v, mask=inside)
    root = tl.sqrt_rn(tl.div_rn(v, square_correction)) + eps
    delta = scale * tl.div_rn(tl.div_rn(m, mean_correction), root)
    _update(weight, extra_bits, decay, delta, at, inside, DECAYS, INTERPRETED)


@triton.jit
def add_delta(
    weight,
    extra_bits,
    tensors,
    chunks,
    delta,
    decay,
    scale,
    numel,
    DECAYS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if tensors is not None:
        row, first = _place(tensors, chunks, CHUNK, BLOCK, 5)
        weight, delta, numel = _address(row, weight), _address(row + 4, delta), tl.multiple_of(tl.load(row + 2), 16)
        if extra_bits is not None:
            extra_bits = _address(row + 1, extra_bits)
    at = first + tl.arange(0, BLOCK)
    inside = at < numel
    _update(weight, extra_bits, decay, scale * tl.load(delta + at, mask=inside), at, inside, DECAYS, INTERPRETED)
