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
from zolightning.kernels.adam import AdamStep
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
    groups, others = _grouped(zip(outs, weights, keys, coefficients, map(_base_of, keys), strict=True))
    for out, weight, key, table, _ in others:
        perturb(out, weight, key, table, kind)
    for members in groups:
        first, beside, key, table, _ = members[0]
        noise = (key, table, key.shape[0], 0, 0)
        tables = _tables_of(members, _places([member[2] for member in members]))
        arguments = (first, beside, *tables, None, None, None, *noise)
        _launch_for_each(triton_kernels.perturb, arguments, **_constants(key.shape[0], kind))


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
    groups, others = _grouped(zip(weights, rests, keys, coefficients, decays, map(_base_of, keys), strict=True))
    for weight, rest, key, table, decay, _ in others:
        add(weight, key, table, kind, decay, rest)
    for members in groups:
        first, beside, key, table, decay, _ = members[0]
        noise = (key, table, key.shape[0], 0, 0)
        tables = _tables_of(members, _places([member[2] for member in members]))
        arguments = (first, beside, *tables, decay, None, *noise)
        _launch_for_each(triton_kernels.add, arguments, **_constants(key.shape[0], kind), DECAYS=decay != 1.0)


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


def add_adam(
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    keys: Tensor,
    coefficients: Tensor,
    kind: NoiseKind,
    step: AdamStep,
    decay: float = 1.0,
    rest: Tensor | None = None,
    start: int = 0,
) -> None:
    arguments = (weight, rest, None, None, decay, mean, square, *step)
    constants = {"DECAYS": decay != 1.0, "CHUNK": _CHUNK}
    _run(triton_kernels.add_adam, weight, arguments, keys, coefficients, kind, start, **constants)


def add_adam_to_each(
    weights: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    keys: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    decays: Sequence[float],
    rests: Sequence[Tensor | None],
    kind: NoiseKind,
    step: AdamStep,
) -> None:
    thirds = zip(keys, means, squares, strict=True)
    groups, others = _grouped(zip(weights, rests, thirds, coefficients, decays, map(_base_of, keys), strict=True))
    for members in list(groups):
        if any((mean.data_ptr() | square.data_ptr()) % 16 for _, _, (_, mean, square), *_ in members):
            groups.remove(members)
            others += members
    for weight, rest, (key, mean, square), table, decay, _ in others:
        add_adam(weight, mean, square, key, table, kind, step, decay, rest)
    for members in groups:
        first, beside, (key, mean, square), table, decay, _ = members[0]
        own_keys, own_means, own_squares = zip(*(member[2] for member in members), strict=True)
        tables = _tables_of(members, _places(own_keys), _addresses(own_means), _addresses(own_squares))
        arguments = (first, beside, *tables, decay, mean, square, *step, key, table, key.shape[0], 0, 0)
        _launch_for_each(triton_kernels.add_adam, arguments, **_constants(key.shape[0], kind), DECAYS=decay != 1.0)


def curve(curvature: Tensor, keys: Tensor, kind: NoiseKind, change: Change, start: int = 0) -> None:
    arguments = (None, None, 1.0, curvature, *change)
    _run(triton_kernels.add_curved, curvature, arguments, keys, change.squares, kind, start, DECAYS=False)


def add_delta(
    weight: Tensor, delta: Tensor, decay: float = 1.0, rest: Tensor | None = None, scale: float = 1.0
) -> None:
    if not weight.numel():
        return
    grid = (triton.cdiv(weight.numel(), _BLOCK),)
    arguments = (weight, rest, None, None, delta.contiguous(), decay, scale, weight.numel())
    constants = {"DECAYS": decay != 1.0, "INTERPRETED": _INTERPRETED, "BLOCK": _BLOCK, "CHUNK": _CHUNK}
    _launch(triton_kernels.add_delta, grid, weight, *arguments, **constants)


def add_delta_to_each(
    weights: Sequence[Tensor],
    deltas: Sequence[Tensor],
    decays: Sequence[float],
    rests: Sequence[Tensor | None],
    scale: float,
) -> None:
    groups, others = _grouped(zip(weights, rests, deltas, decays, strict=True))
    for members in list(groups):
        if any(delta.data_ptr() % 16 or not delta.is_contiguous() for _, _, delta, _ in members):
            groups.remove(members)
            others += members
    for weight, rest, delta, decay in others:
        add_delta(weight, delta, decay, rest, scale)
    for members in groups:
        first, beside, delta, decay = members[0]
        tables = _tables_of(members, _addresses([member[2] for member in members]))
        arguments = (first, beside, *tables, delta, decay, scale, 0)
        _launch_for_each(triton_kernels.add_delta, arguments, DECAYS=decay != 1.0, INTERPRETED=_INTERPRETED)


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


_Member = tuple[Any, ...]  # of a launch for several: a tensor, what is beside it, if anything is, a third, and the rest


def _grouped(each: Iterable[_Member]) -> tuple[list[list[_Member]], list[_Member]]:
    """What one launch can do, which has one of all but the first three, and what takes a launch each."""
    groups, others = defaultdict(list), []
    for one in each:
        tensor, beside, _, *shared = one
        if (tensor.data_ptr() | (0 if beside is None else beside.data_ptr()) | tensor.numel()) % 16:
            others.append(one)
        else:
            same = [id(value) if isinstance(value, Tensor) else value for value in shared]
            groups[tensor.device, tensor.dtype, None if beside is None else beside.dtype, *same].append(one)
    return list(groups.values()), others


def _base_of(keys: Tensor) -> int:
    """Of which table keys are a view, if they are."""
    return id(keys._base)


def _places(keys: Sequence[Tensor]) -> list[int]:
    """Where keys are, counted in words from the first ones: rows of one table are at the same places at each step."""
    first = keys[0].data_ptr()
    return [(key.data_ptr() - first) // key.element_size() for key in keys]


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _tables_of(members: Sequence[_Member], *last: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``tensors`` and ``chunks`` of the kernels, the former with these last columns."""
    tensors, beside, *_ = zip(*members, strict=True)
    columns = _addresses(tensors), _addresses(beside), [tensor.numel() for tensor in tensors], *last
    return _tables(tuple(zip(*columns, strict=True)), tensors[0].device)


def _launch_for_each(kernel: Any, arguments: tuple[Any, ...], **constants: Any) -> None:
    """Launches a kernel once for several tensors; its first arguments are one of them, one beside, and the tables."""
    first, _, _, chunks, *_ = arguments
    if len(chunks):
        _launch(kernel, (len(chunks) * _CHUNK,), first, *arguments, **constants, BLOCK=_BLOCK, CHUNK=_CHUNK)


@functools.lru_cache(maxsize=32)
def _tables(entries: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Made once, for weights stay where they are."""
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
