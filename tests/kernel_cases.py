"""Every loop of the Triton backend beside that of the CPU, bit for bit: under the interpreter, or on a device.

As a program, with ``TRITON_INTERPRET=1`` in its environment, which must be there before Triton is imported: prints the
cases that differ, and how many there were.
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from zolightning import kernels
from zolightning.kernels.curvature import Change
from zolightning.kernels.noise import NOISE_KINDS, NoiseKind, coefficient, key

NUMEL = 549  # an odd number, and more than a block of the interpreter's
SIZES = (32, 0, 1600, 37, 16, 2 * NUMEL, 1584, 48)  # of several tensors
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Shape = Literal["scaled", "masked"] | None


def any_bits(numel: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers of any bit pattern: zeros of both signs, subnormal numbers, infinities and NaNs among them."""
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(integer)
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(limits.min, limits.max + 1, (numel,), generator=generator, dtype=torch.int64).to(integer)
    bits[::5] &= 2 ** (8 * dtype.itemsize - 10) - 1  # subnormal numbers and zeros
    values = bits.view(dtype)
    values[1::7], values[2::11], values[3::53] = -0.0, 0.0, float("nan")
    values[4::3] = torch.randn(values[4::3].shape, generator=generator).to(dtype) * 0.02
    return values


def noise(queries: int, kind: NoiseKind, device: str) -> dict[str, Any]:
    """With coefficients that cancel where two queries have one code."""
    keys = torch.tensor([key(0, 1, query, "w") for query in range(queries)], dtype=torch.int32)
    values = [coefficient(1e-3 * (-1) ** query, kind) for query in range(queries)]
    return {"keys": keys.to(device), "coefficients": torch.tensor(values, device=device), "kind": kind}


def shaped(shape: Shape, size: tuple[int, ...], device: str) -> dict[str, Any]:
    """What becomes of noise: nothing; it is divided by roots, some of which are no fp32 numbers; or left out."""
    if shape == "scaled":
        return {"curvature": torch.linspace(1e-4, 3.7, math.prod(size)).view(size).to(device)}
    return {} if shape is None else {"threshold": 0.019999999552965164}  # of the numbers' standard deviation


def perturb(
    loops: Any,
    device: str,
    dtype: torch.dtype,
    out: torch.dtype,
    queries: int,
    kind: NoiseKind,
    start: int,
    shape: Shape = None,
):
    weight = any_bits(NUMEL, dtype).to(device)
    one, plus, minus = torch.empty(3, NUMEL + 3, dtype=out, device=device)[:, :NUMEL].unbind()
    options = noise(queries, kind, device) | {"start": start} | shaped(shape, (NUMEL,), device)
    loops.perturb(one, weight, **options)
    loops.perturb_both(plus, minus, weight, **options)
    return one, plus, minus


def perturb_rows(loops: Any, device: str, dtype: torch.dtype, queries: int, kind: NoiseKind, shape: Shape = None):
    table, rows = any_bits(7 * 38, dtype).view(7, 38).to(device), torch.tensor([6, 0, 3, 3, 1]).to(device)
    out = torch.empty(5, 38, dtype=dtype, device=device)
    loops.perturb_rows(out, table, rows, **noise(queries, kind, device), **shaped(shape, (5, 38), device))
    return (out,)


def add(
    loops: Any,
    device: str,
    dtype: torch.dtype,
    rest: torch.dtype | None,
    decay: float,
    queries: int,
    kind: NoiseKind,
    shape: Shape = None,
):
    weight, low = stored(dtype, rest, device)
    options = noise(queries, kind, device) | {"decay": decay, "rest": low, "start": 2}
    loops.add(weight, **options, **shaped(shape, (NUMEL,), device))
    return (weight,) if low is None else (weight, low)


def add_curved(
    loops: Any,
    device: str,
    dtype: torch.dtype,
    rest: torch.dtype | None,
    decay: float,
    queries: int,
    kind: NoiseKind,
):
    """A curvature that grows, shrinks and comes to both ends of its range; by itself, too."""
    weight, low = stored(dtype, rest, device)
    alone, curvature = torch.linspace(1e-4, 3.7, 2 * NUMEL).to(device).view(2, NUMEL).unbind()
    squares = torch.tensor([1e-3 * (-1) ** query * 7**query for query in range(queries)], device=device)
    change, options = Change(-1e-3, squares, 0.01, 3.6), noise(queries, kind, device)
    loops.add_curved(weight, curvature, **options, change=change, decay=decay, rest=low, start=2)
    loops.curve(alone, options["keys"], kind, change, start=4)
    return (weight, alone, curvature) if low is None else (weight, alone, curvature, low)


def add_delta(loops: Any, device: str, dtype: torch.dtype, rest: torch.dtype | None, decay: float):
    weight, low = stored(dtype, rest, device)
    loops.add_delta(weight, any_bits(NUMEL, torch.float32, 2).to(device), decay, low, scale=-1.7e-3)
    return (weight,) if low is None else (weight, low)


def perturb_each(loops: Any, device: str, dtype: torch.dtype, out: torch.dtype, queries: int, kind: NoiseKind):
    """Tensors as for `add_to_each`, of which every second one is zero."""
    weights = [any_bits(NUMEL, dtype, numel).repeat(3)[:numel].to(device) for numel in SIZES]
    outs = [torch.empty_like(weight, dtype=out) for weight in weights]
    weights = [None if i % 2 else weight for i, weight in enumerate(weights)]
    loops.perturb_each(outs, weights, *noise_of_each(queries, kind, device), kind)
    return outs


def noise_of_each(queries: int, kind: NoiseKind, device: str) -> tuple[Any, list[Tensor]]:
    """Keys, rows of one table, and one table of coefficients."""
    keys = [[key(0, 1, query, str(numel)) for query in range(queries)] for numel in SIZES]
    coefficients = noise(queries, kind, device)["coefficients"]
    return torch.tensor(keys, dtype=torch.int32).to(device).unbind(), [coefficients] * len(SIZES)


def add_to_each(loops: Any, device: str, dtype: torch.dtype, rest: torch.dtype | None, queries: int, kind: NoiseKind):
    """Tensors of no element, of some, of several chunks, of an odd number, and not aligned; with and without decay."""
    found = []
    for numel in SIZES:
        weight, low = stored(dtype, rest, device)
        found.append((weight.repeat(3)[:numel], None if low is None else low.repeat(3)[:numel]))
    found[4] = tuple(None if tensor is None else torch.cat([tensor[:1], tensor])[1:] for tensor in found[4])
    weights, rests = zip(*found, strict=True)
    decays = [1.0, 1.0, 0.9, 0.9, 0.9, 1.0, 1.0, 0.9]
    loops.add_to_each(weights, *noise_of_each(queries, kind, device), decays, rests, kind)
    return (*weights, *(rest for rest in rests if rest is not None))


def cases() -> Iterator[tuple[Any, ...]]:
    """A function, and its arguments after the first two."""
    pairs = [(dtype, dtype) for dtype in DTYPES] + [(torch.float32, torch.bfloat16)]
    for kind, (queries, start) in product(NOISE_KINDS, ((1, 2**31 - 6), (2, 2**32 - 2**12), (3, 0))):
        yield from ((perturb, *dtypes, queries, kind, start) for dtypes in pairs)
        yield from ((perturb_rows, dtype, queries, kind) for dtype in DTYPES)
        for dtypes, shape in zip(pairs, ("scaled", "masked", "scaled", "masked"), strict=True):
            yield (perturb, *dtypes, queries, kind, start, shape)
            yield (perturb_rows, dtypes[0], queries, kind, shape)
    rests = [(dtype, None) for dtype in DTYPES]
    rests += [(torch.bfloat16, torch.int16), (torch.bfloat16, torch.int8), (torch.float16, torch.float32)]
    yield from (
        (add_to_each, *dtypes, q, kind) for dtypes, (q, kind) in product(rests, [(1, "gaussian"), (3, "rademacher")])
    )
    for dtypes, decay in product(rests, (1.0, 1 - 1e-4)):
        yield from ((add, *dtypes, decay, queries, kind) for queries, kind in zip((1, 5), NOISE_KINDS, strict=True))
        yield (add_delta, *dtypes, decay)
        yield (add, *dtypes, decay, 2, "gaussian", "masked")
        yield from (
            (add_curved, *dtypes, decay, queries, kind) for queries, kind in zip((1, 5), NOISE_KINDS, strict=True)
        )


def stored(dtype: torch.dtype, rest: torch.dtype | None, device: str) -> tuple[Tensor, Tensor | None]:
    """A weight and what completes it, some elements of which somebody has written since."""
    weight = any_bits(NUMEL, dtype)
    if rest is None:
        return weight.to(device), None
    if rest.is_floating_point:
        low = weight.to(rest)
        low[::2] += 1e-6
    else:
        limits = torch.iinfo(rest)
        low = torch.randint(limits.min, limits.max + 1, (NUMEL,), generator=torch.Generator().manual_seed(1)).to(rest)
    return weight.to(device), low.to(device)


def differing(loops: Any, device: str, with_masters: bool = True) -> list[str]:
    """The cases in which a backend writes something else than the loops of the CPU; any NaN is like any other."""
    return [
        f"{function.__name__} {arguments}"
        for function, *arguments in cases()
        if hasattr(loops, function.__name__)
        and (with_masters or arguments[:2] != [torch.float16, torch.float32])
        and not all(map(same, function(loops, device, *arguments), function(kernels, "cpu", *arguments)))
    ]


def same(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one.cpu(), other.cpu())
    integer = {2: torch.int16, 4: torch.int32}[one.element_size()]
    one, other = one.cpu(), other.cpu()
    return torch.equal(
        torch.where(one.isnan(), 1, one.contiguous().view(integer)),
        torch.where(other.isnan(), 1, other.contiguous().view(integer)),
    )


if __name__ == "__main__":
    from zolightning.kernels import triton_loops

    triton_loops._BLOCK, triton_loops._CHUNK = 512, 2  # a program costs as much with any block
    missing = torch.empty(2, 4)
    triton_loops.perturb_rows(missing, torch.ones(3, 4), torch.tensor([-1, 3]), **noise(1, "gaussian", "cpu"))
    assert missing.isnan().all(), "a row that does not exist was read"
    print(*differing(triton_loops, "cpu"), sum(1 for _ in cases()), sep="\n")
