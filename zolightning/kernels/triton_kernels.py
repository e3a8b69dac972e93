"""Kernels in Triton, with the arithmetic of ``torch_loops.py``, which explains it.

A program makes the noise of ``BLOCK`` neighbouring elements (``triton_noise.py``), and reads and writes every tensor
once (``triton_update.py``). ``start``, even, is the index of a tensor's first element, and ``numel`` the number of
elements. ``INTERPRETED`` says that Triton's interpreter runs it, which rounds differently.

One launch may work on several tensors of one dtype. ``tensors``, int64, then has a row for each of them: its address,
that of a second tensor, the number of elements, the offset of its keys in ``keys``, and the addresses of further
tensors or the bits of a threshold. ``chunks``, int32, has a row for every ``CHUNK`` programs: the index of a tensor,
and of a chunk in it. The other arguments of a kernel are those of the first tensor, for their types. All tensors must
be aligned to 16 bytes and have multiples of 16 elements; otherwise a thread would read one element at a time.
"""

import triton
import triton.language as tl

from zolightning.kernels.triton_noise import noise_of, pairs_from
from zolightning.kernels.triton_update import rounded, shaped, update, wide


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
        value = wide(tl.load(weight + at, mask=inside), INTERPRETED)
    else:
        value = tl.zeros((BLOCK,), tl.float32)
    added = shaped(noise, value, curvature, threshold, at, inside)
    tl.store(plus + at, rounded(value + added, plus.dtype.element_ty, INTERPRETED), mask=inside)
    if minus is not None:
        negated = noise * -1.0  # on a device Triton's unary minus is 0 - x, which does not turn 0 into -0
        added = shaped(negated, value, curvature, threshold, at, inside)
        tl.store(minus + at, rounded(value + added, minus.dtype.element_ty, INTERPRETED), mask=inside)


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
    value = wide(tl.load(table + index + column, mask=exists, other=float("nan")), INTERPRETED)
    at = place * columns + column
    added = shaped(noise, value, curvature, threshold, at, inside)
    tl.store(out + at, rounded(value + added, out.dtype.element_ty, INTERPRETED), mask=inside)


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
    update(weight, extra_bits, decay, noise, at, at < numel, DECAYS, INTERPRETED, threshold)


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
        update(weight, extra_bits, decay, tl.div_rn(noise, tl.sqrt_rn(curved)), at, inside, DECAYS, INTERPRETED)


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
    update(weight, extra_bits, decay, delta, at, inside, DECAYS, INTERPRETED)


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
    update(weight, extra_bits, decay, scale * tl.load(delta + at, mask=inside), at, inside, DECAYS, INTERPRETED)
