"""The loops in Triton, for CUDA devices: see :mod:`zolightning.kernels`.

They launch the kernels of :mod:`~zolightning.kernels.triton_kernels`, which read keys and coefficients from device
memory, so that nothing is recompiled for new numbers and a CUDA graph can be replayed with them. Products and
sums are not fused: that would round once instead of twice.

Importing this module needs Triton, which comes with PyTorch for CUDA. With ``TRITON_INTERPRET=1`` in the environment
before the import, the same source runs on CPU tensors, slowly, in NumPy.
"""

import functools
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import chain
from operator import methodcaller, or_
from typing import Any

import torch
import triton
from torch import Tensor

from zolightning.kernels import triton_kernels
from zolightning.kernels.adam import AdamStep
from zolightning.kernels.curvature import Change
from zolightning.kernels.noise import Noise, NoiseKind, on_device

_BLOCK = 2048  # elements per program: two 16-byte accesses of bf16 per thread
_CHUNK = 32  # programs for one row of the table that says where they work, in a launch for several tensors
_NUM_WARPS = 4
_UNROLLED = (1, 2, 4, 8)  # numbers of queries that have a kernel of their own; all others share one with a loop
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_POPC = not _INTERPRETED and torch.version.hip is None  # an NVIDIA instruction
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_Tables = tuple[Tensor, Tensor] | tuple[None, None]  # ``tensors`` and ``chunks`` of the kernels, for several tensors


def available(*tensors: Tensor | None, start: int = 0) -> bool:
    """Whether these loops can work on contiguous tensors, the first of which begins with element `start`."""
    return all(tensor is None or tensor.dtype in _DTYPES for tensor in tensors) and start % 2 == 0


def perturb(
    out: Tensor,
    weight: Tensor | None,
    noise: Noise,
    start: int = 0,
    curvature: Tensor | None = None,
    threshold: float | None = None,
    tables: _Tables = (None, None),
) -> None:
    arguments = (out, weight, *tables, None, curvature, threshold)
    _run(triton_kernels.perturb, out, arguments, noise, start, tables)


def perturb_both(
    plus: Tensor,
    minus: Tensor,
    weight: Tensor,
    noise: Noise,
    start: int = 0,
    curvature: Tensor | None = None,
    threshold: float | None = None,
) -> None:
    arguments = (plus, weight, None, None, minus, curvature, threshold)
    _run(triton_kernels.perturb, weight, arguments, noise, start)


def perturb_rows(
    out: Tensor,
    table: Tensor,
    rows: Tensor,
    noise: Noise,
    curvature: Tensor | None = None,
    threshold: float | None = None,
) -> None:
    if not out.numel():
        return
    count, columns = table.shape
    block = min(_BLOCK, max(2, triton.next_power_of_2(columns)))
    grid = (len(rows), triton.cdiv(columns, block))
    queries = noise.keys.shape[0]
    arguments = (out, table, rows.contiguous(), curvature, threshold, noise.keys, noise.coefficients, queries)
    constants = _constants(queries, noise.kind)
    _launch(triton_kernels.perturb_rows, grid, out, *arguments, count, columns, **constants, BLOCK=block)


def add(
    weight: Tensor,
    noise: Noise,
    decay: float = 1.0,
    extra_bits: Tensor | None = None,
    start: int = 0,
    threshold: float | None = None,
    tables: _Tables = (None, None),
) -> None:
    arguments = (weight, extra_bits, *tables, decay, threshold)
    _run(triton_kernels.add, weight, arguments, noise, start, tables, DECAYS=decay != 1.0)


def add_curved(
    weight: Tensor,
    curvature: Tensor,
    noise: Noise,
    change: Change,
    decay: float = 1.0,
    extra_bits: Tensor | None = None,
    start: int = 0,
    tables: _Tables = (None, None),
) -> None:
    arguments = (weight, extra_bits, *tables, decay, curvature, *change)
    _run(triton_kernels.add_curved, weight, arguments, noise, start, tables, DECAYS=decay != 1.0)


def add_adam(
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    noise: Noise,
    step: AdamStep,
    decay: float = 1.0,
    extra_bits: Tensor | None = None,
    start: int = 0,
    tables: _Tables = (None, None),
) -> None:
    arguments = (weight, extra_bits, *tables, decay, mean, square, *step)
    _run(triton_kernels.add_adam, weight, arguments, noise, start, tables, DECAYS=decay != 1.0)


def curve(curvature: Tensor, noise: Noise, change: Change, start: int = 0) -> None:
    arguments = (None, None, None, None, 1.0, curvature, *change)
    _run(triton_kernels.add_curved, curvature, arguments, noise, start, DECAYS=False)


def add_delta(
    weight: Tensor,
    delta: Tensor,
    decay: float = 1.0,
    extra_bits: Tensor | None = None,
    scale: float = 1.0,
    tables: _Tables = (None, None),
) -> None:
    programs = _programs(weight, tables)
    if programs:
        arguments = (weight, extra_bits, *tables, delta.contiguous(), decay, scale, weight.numel())
        constants = {"DECAYS": decay != 1.0, "INTERPRETED": _INTERPRETED, "BLOCK": _BLOCK, "CHUNK": _CHUNK}
        _launch(triton_kernels.add_delta, (programs,), weight, *arguments, **constants)


# The arguments of each loop that are tensors with one number of elements, in the order of the kernel's table
_TENSORS: dict[Callable[..., None], tuple[str, ...]] = {
    perturb: ("out", "weight", "curvature"),
    add: ("weight", "extra_bits"),
    add_curved: ("weight", "extra_bits", "curvature"),
    add_adam: ("weight", "extra_bits", "mean", "square"),
    add_delta: ("weight", "extra_bits", "delta"),
}


def for_each(loop: Callable[..., None], calls: Iterable[Mapping[str, Any]]) -> None:
    """Calls one of the loops in ``_TENSORS`` once with each of these arguments, in as few launches as possible.

    One launch serves all calls that differ only in what the kernels' tables hold (``triton_kernels.py``), if the memory
    of their tensors is aligned.
    """
    calls, names = list(calls), _TENSORS[loop]
    tensors = [_column(calls, name) for name in names]
    noises = [call["noise"] for call in calls if "noise" in call]  # of each call, or of none
    keys, thresholds = [noise.keys for noise in noises] or [None] * len(calls), _column(calls, "threshold")
    alike: defaultdict[tuple[Hashable, ...], list[int]] = defaultdict(list)  # the places of calls in `calls`
    addresses = [[0 if tensor is None else tensor.data_ptr() for tensor in column] for column in (*tensors, keys)]
    numbers = list(zip(map(Tensor.numel, tensors[0]), *addresses, strict=True))
    are_flat = [[tensor is None or tensor.is_contiguous() for tensor in column] for column in tensors]
    devices = [tensor.device for tensor in tensors[0]]
    tables = map(id, [None if key is None else key._base for key in keys])  # of which the keys are a row
    are_whole = [threshold is None for threshold in thresholds]
    shared = _shared(calls, tensors, noises, names)
    # Most calls share objects, which is quicker to check than equality of values.
    same = zip(devices, tables, are_whole, *(map(id, column) for column in shared), strict=True)
    for place, (own, objects, flat) in enumerate(zip(numbers, same, zip(*are_flat, strict=True), strict=True)):
        if functools.reduce(or_, own[:-1]) % 16 or False in flat:
            loop(**calls[place])
        else:
            alike[objects].append(place)
    groups: defaultdict[tuple[Hashable, ...], list[int]] = defaultdict(list)
    for objects, places in alike.items():
        groups[*objects[:3], *[_identity(column[places[0]]) for column in shared]] += places
    for places in groups.values():
        start = numbers[places[0]][-1]
        rows = tuple([_row(start, *numbers[place], thresholds[place]) for place in places])
        loop(**calls[places[0]], tables=_tables(rows, devices[places[0]]))


def _column(calls: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """An argument of each call; None where it is left out."""
    return list(map(methodcaller("get", name), calls))


def _shared(
    calls: Sequence[Mapping[str, Any]], tensors: Sequence[list[Any]], noises: Sequence[Noise], names: tuple[str, ...]
) -> list[list[Any]]:
    """What calls must have in common to share a launch, which is what the rows of the table do not hold.

    Of `tensors`, arguments of these names, it is their dtypes; of noise all but the keys; and all other arguments.
    """
    dtypes = [[None if tensor is None else tensor.dtype for tensor in column] for column in tensors]
    parts: list[list[Any]] = [[n.coefficients for n in noises], [n.kind for n in noises]] if noises else []
    others = set(chain.from_iterable(calls)) - {*names, "noise", "threshold"}
    return [*dtypes, *parts, *[_column(calls, name) for name in others]]


def _identity(value: Any) -> Hashable:
    """A value that is equal for two arguments if a launch can use one in place of the other."""
    if isinstance(value, tuple):
        return tuple(map(_identity, value))
    return id(value) if isinstance(value, Tensor) else value


def _row(start: int, numel: int, address: int, beside: int, *further: Any) -> tuple[int, ...]:
    """A row of the kernels' ``tensors``. Keys are given by their offset from `start`, in words, equal in each step."""
    *more, keys, threshold = further
    bits = [] if threshold is None else [int.from_bytes(struct.pack("<f", threshold), "little")]
    return address, beside, numel, (keys - start) // 4, *more, *bits


def _run(
    kernel: Any,
    weight: Tensor,
    arguments: tuple[Any, ...],
    noise: Noise,
    start: int,
    tables: _Tables = (None, None),
    **constants: Any,
) -> None:
    """Launches a kernel over the elements of a weight, or of all in the tables, and their noise."""
    programs = _programs(weight, tables)
    if programs:
        queries = noise.keys.shape[0]  # once: a launch costs ten microseconds as it is
        own = (noise.keys, noise.coefficients, queries, start % 2**32, weight.numel())
        constants |= _constants(queries, noise.kind)
        _launch(kernel, (programs,), weight, *arguments, *own, **constants, BLOCK=_BLOCK, CHUNK=_CHUNK)


def _programs(weight: Tensor, tables: _Tables) -> int:
    _, chunks = tables
    return triton.cdiv(weight.numel(), _BLOCK) if chunks is None else len(chunks) * _CHUNK


@functools.lru_cache(maxsize=32)
def _tables(entries: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The kernels' ``tensors`` and ``chunks``; cached, because weights keep their addresses."""
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
