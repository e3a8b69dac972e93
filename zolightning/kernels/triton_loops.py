"""The loops in Triton, for CUDA devices: see :mod:`zolightning.kernels`.

They launch the kernels of :mod:`~zolightning.kernels.triton_kernels`, which read keys and coefficients from device
memory, so that nothing is compiled again for other numbers and a CUDA graph can be replayed with new ones. Products and
sums are not fused: that would round once instead of twice.

Importing this module needs Triton, which comes with PyTorch for CUDA. With ``TRITON_INTERPRET=1`` in the environment
before the import, the same source runs on CPU tensors, slowly, in NumPy.
"""

import functools
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from zolightning.kernels import triton_kernels
from zolightning.kernels.curvature import Change
from zolightning.kernels.noise import NoiseKind, on_device

_BLOCK = 2048  # elements a program: two 16-byte accesses of bf16 a thread
_CHUNK = 32  # programs to an entry of the table that says where they work, in a launch for several tensors
_NUM_WARPS = 4
_UNROLLED = (1, 2, 4, 8)  # numbers of queries with a kernel of their own; all others share one with a loop
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_POPC = not _INTERPRETED and torch.version.hip is None  # an instruction of NVIDIA's
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(*tensors: Tensor, start: int = 0) -> bool:
    """Whether these loops can work on contiguous tensors, the first of which begins with element `start`."""
    return all(tensor.dtype in _DTYPES for tensor in tensors) and start % 2 == 0


def perturb(
    out: Tensor,
    weight: Tensor | None,
    keys: Tensor,
    coefficients: Tensor,
    kind: NoiseKind,
    start: int = 0,
    curvature: Tensor | None = None,
    threshold: float | None = None,
) -> None:
    arguments = (out, weight, None, None, None, curvature, threshold)
    _run(triton_kernels.perturb, out, arguments, keys, coefficients, kind, start, CHUNK=_CHUNK)


def perturb_each(
    outs: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    keys: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    kind: NoiseKind,
) -> None:
    groups, others = _grouped(zip(outs, weights, keys, coefficients, strict=True))
    for out, weight, key, table in others:
        perturb(out, weight, key, table, kind)
    for members in groups:
        _launch_for_each(triton_kernels.perturb, members, (None, None, None), kind)


def perturb_both(
    plus: Tensor,
    minus: Tensor,
    weight: Tensor,
    keys: Tensor,
    coefficients: Tensor,
    kind: NoiseKind,
    start: int = 0,
    curvature: Tensor | None = None,
    threshold: float | None = None,
) -> None:
    if keys.shape[0] > 1:  # sums of several queries, which no evaluation asks for, are not negated by one sign
        perturb(plus, weight, keys, coefficients, kind, start, curvature, threshold)
        perturb(minus, weight, keys, -coefficients, kind, start, curvature, threshold)
        return
    arguments = (plus, weight, None, None, minus, curvature, threshold)
    _run(triton_kernels.perturb, weight, arguments, keys, coefficients, kind, start, CHUNK=_CHUNK)


def perturb_rows(
    out: Tensor,
    table: Tensor,
    rows: Tensor,
    keys: Tensor,
    coefficients: Tensor,
    kind: NoiseKind,
    curvature: Tensor | None = None,
    threshold: float | None = None,
) -> None:
    if not out.numel():
        return
    count, columns = table.shape
    block = min(_BLOCK, max(2, triton.next_power_of_2(columns)))
    grid = (len(rows), triton.cdiv(columns, block))
    queries = keys.shape[0]
    arguments = (out, table, rows.contiguous(), curvature, threshold, keys, coefficients, queries, count, columns)
    _launch(triton_kernels.perturb_rows, grid, out, *arguments, **_constants(queries, kind), BLOCK=block)


def add(
    weight: Tensor,
    keys: Tensor,
    coefficients: Tensor,
    kind: NoiseKind,
    decay: float = 1.0,
    rest: Tensor | None = None,
    start: int = 0,
    threshold: float | None = None,
) -> None:
    arguments = (weight, rest, None, None, decay, threshold)
    _run(triton_kernels.add, weight, arguments, keys, coefficients, kind, start, DECAYS=decay != 1.0, CHUNK=_CHUNK)


def add_to_each(
    weights: Sequence[Tensor],
    keys: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    decays: Sequence[float],
    rests: Sequence[Tensor | None],
    kind: NoiseKind,
) -> None:
    groups, others = _grouped(zip(weights, rests, keys, coefficients, decays, strict=True))
    for weight, rest, key, table, decay in others:
        add(weight, key, table, kind, decay, rest)
    for members in groups:
        *_, decay = members[0]
        _launch_for_each(triton_kernels.add, members, (decay, None), kind, DECAYS=decay != 1.0)


def add_curved(
    weight: Tensor,
    curvature: Tensor,
    keys: Tensor,
    coefficients: Tensor,
    kind: NoiseKind,
    change: Change,
    decay: float = 1.0,
    rest: Tensor | None = None,
    start: int = 0,
) -> None:
    arguments = (weight, rest, decay, curvature, *change)
    _run(triton_kernels.add_curved, weight, arguments, keys, coefficients, kind, start, DECAYS=decay != 1.0)


def curve(curvature: Tensor, keys: Tensor, kind: NoiseKind, change: Change, start: int = 0) -> None:
    arguments = (None, None, 1.0, curvature, *change)
    _run(triton_kernels.add_curved, curvature, arguments, keys, change.squares, kind, start, DECAYS=False)


def add_delta(
    weight: Tensor, delta: Tensor, decay: float = 1.0, rest: Tensor | None = None, scale: float = 1.0
) -> None:
    if not weight.numel():
        return
    grid = (triton.cdiv(weight.numel(), _BLOCK),)
    arguments = (weight, rest, decay, delta.contiguous(), scale, weight.numel())
    _launch(
        triton_kernels.add_delta, grid, weight, *arguments, DECAYS=decay != 1.0, BLOCK=_BLOCK, INTERPRETED=_INTERPRETED
    )


def _run(
    kernel: Any,
    weight: Tensor,
    arguments: tuple[Any, ...],
    keys: Tensor,
    coefficients: Tensor,
    kind: NoiseKind,
    start: int,
    **constants: Any,
) -> None:
    """Launches a kernel over the elements of a weight and their noise."""
    queries, numel = keys.shape[0], weight.numel()  # once: a launch costs ten microseconds as it is
    if not numel:
        return
    noise = (keys, coefficients, queries, start % 2**32)
    constants |= _constants(queries, kind)
    _launch(kernel, (triton.cdiv(numel, _BLOCK),), weight, *arguments, *noise, numel, **constants, BLOCK=_BLOCK)


def _grouped(each: Iterable[tuple[Any, ...]]) -> tuple[list[list[tuple[Any, ...]]], list[tuple[Any, ...]]]:
    """What one launch can do, and what takes a launch each, see the kernels.

    Args:
        each: a tensor, what is beside it, if anything is, its keys and coefficients, and what else a launch has once.
    """
    groups, others = defaultdict(list), []
    for one in each:
        tensor, beside, _, coefficients, *more = one
        if (tensor.data_ptr() | (0 if beside is None else beside.data_ptr()) | tensor.numel()) % 16:
            others.append(one)
        else:
            alike = tensor.device, tensor.dtype, None if beside is None else beside.dtype, id(coefficients), *more
            groups[alike].append(one)
    return list(groups.values()), others


def _launch_for_each(
    kernel: Any, members: Sequence[tuple[Any, ...]], arguments: tuple[Any, ...], kind: NoiseKind, **constants: Any
) -> None:
    """Launches a kernel once for all that :func:`_grouped` has put together."""
    first, beside, keys, coefficients, *_ = members[0]
    entries = [
        (
            tensor.data_ptr(),
            0 if other is None else other.data_ptr(),
            tensor.numel(),
            (key.data_ptr() - keys.data_ptr()) // keys.element_size(),
        )
        for tensor, other, key, *_ in members
    ]
    tensors, chunks = _tables(tuple(entries), first.device)
    if not len(chunks):
        return
    queries = keys.shape[0]
    constants |= _constants(queries, kind)
    arguments = (first, beside, tensors, chunks, *arguments, keys, coefficients, queries, 0, 0)
    _launch(kernel, (len(chunks) * _CHUNK,), first, *arguments, **constants, BLOCK=_BLOCK, CHUNK=_CHUNK)


@functools.lru_cache(maxsize=32)
def _tables(entries: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """``tensors`` and ``chunks`` of the kernels: made once, for weights stay where they are."""
    tensors = torch.tensor(entries, dtype=torch.int64)
    counts = -(-tensors[:, 2] // (_BLOCK * _CHUNK))
    owners = torch.arange(len(counts)).repeat_interleave(counts)
    within = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
    return on_device(tensors, device), on_device(torch.stack([owners, within], dim=1).to(torch.int32), device)


def _constants(queries: int, kind: NoiseKind) -> dict[str, Any]:
    return {
        "QUERIES": queries if queries in _UNROLLED else 0,
        "RADEMACHER": kind == "rademacher",
        "POPC": _POPC,
        "INTERPRETED": _INTERPRETED,
    }


def _launch(kernel: Any, grid: tuple[int, ...], where: Tensor, *arguments: Any, **constants: Any) -> None:
    with torch.cuda.device_of(where):  # Triton launches on the current device
        kernel[grid](*arguments, **constants, num_warps=_NUM_WARPS, enable_fp_fusion=False)
