"""Whether the loops over parameters write the same bits as those of the CPU: on a device, or in another backend."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from zolightning import kernels
from zolightning.bench.measure import CPU
from zolightning.kernels.adam import adam_step
from zolightning.kernels.curvature import Change
from zolightning.kernels.noise import NOISE_KINDS, NoiseKind, coefficient, key

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = (*((dtype, dtype) for dtype in DTYPES), (torch.float32, torch.bfloat16))  # of a weight, and of a perturbed one
# Of a weight, and of what completes it to float32: nothing, low words or low bytes, or a master copy
STORED: tuple[tuple[torch.dtype, torch.dtype | None], ...] = (
    *((dtype, None) for dtype in DTYPES),
    (torch.bfloat16, torch.int16),
    (torch.bfloat16, torch.int8),
    (torch.float16, torch.float32),
)
DECAYS = (1.0, 1 - 1e-4)
_DECAYS_OF_EACH = (1.0, 1.0, 0.9, 0.9, 0.9, 1.0, 1.0, 0.9)  # of several weights
_ADAM = adam_step((0.9, 0.999), 3, 1e-8, -1e-3)
HUGE = 2**31 + 16  # elements: more than int32 counts
TAIL = 1008

Shape = Literal["scaled", "masked"] | None
Outputs = Sequence[Tensor]
Case = Callable[[Any, torch.device, int], Outputs]  # takes loops, a device and a number of elements


def comparisons(
    elements: int, huge: int | None = HUGE, loops: Any = kernels
) -> Iterator[tuple[str, Callable[[torch.device], int]]]:
    """Names, and what says how many of the elements that loops write on a device are not those of the CPU.

    Args:
        elements: of the tensors; an odd number is best.
        huge: elements of three more cases, whose last ones are compared, a multiple of 16; none where None.
        loops: a backend, or the choice among them; cases of functions that it lacks are left out.
    """
    if huge is not None:
        for update in (_perturb_huge, _update_huge, _update_each_huge):
            yield f"{update.__name__.strip('_')}, the last of {huge} elements", partial(_compare_huge, update, huge)
    for name, case in cases():
        if hasattr(loops, name.split()[0]):
            yield name, partial(_compare, case, loops, elements)


def cases() -> Iterator[tuple[str, Case]]:
    """Names, which begin with that of a loop, and what runs the loop."""
    for function, *arguments in _cases():
        said = ", ".join(str(argument).removeprefix("torch.") for argument in arguments)
        yield f"{function.__name__.strip('_')} {said}", partial(_run, function, arguments)


def _run(
    function: Callable[..., Outputs], arguments: Sequence[Any], loops: Any, device: torch.device, numel: int
) -> Outputs:
    return function(loops, device, numel, *arguments)


def _cases() -> Iterator[tuple[Any, ...]]:
    """What steps take most first: a device compiles a loop or two for each of them, and may not come to the end."""
    few = tuple(zip((1, 3), NOISE_KINDS, strict=True))
    one, *more = product((1, 2, 3), NOISE_KINDS)
    starts = {1: 2**31 - 6, 2: 2**32 - 2**12, 3: 0}
    yield from ((_perturb, *dtypes, *one, starts[1]) for dtypes in PAIRS)
    yield from ((_perturb_each, *dtypes, *noises) for noises, dtypes in product(few, PAIRS))
    yield from ((_add_to_each, *dtypes, *noises) for noises, dtypes in product(few, STORED))
    yield from ((_perturb_rows, dtype, *one) for dtype in DTYPES)
    yield from ((_add, *dtypes, decay, *noises) for noises, dtypes, decay in product(few, STORED, DECAYS))
    for queries, kind in more:
        yield from ((_perturb, *dtypes, queries, kind, starts[queries]) for dtypes in PAIRS)
        yield from ((_perturb_rows, dtype, queries, kind) for dtype in DTYPES)
    yield from ((_add_delta, *dtypes, decay) for dtypes, decay in product(STORED, DECAYS))
    yield from ((_add_delta_to_each, *dtypes) for dtypes in STORED)
    yield from ((_add, *dtypes, 1.0, 5, "gaussian") for dtypes in STORED)  # by a loop over queries
    shapes: tuple[Shape, ...] = ("scaled", "masked", "scaled", "masked")
    for kind, queries in product(NOISE_KINDS, (1, 2, 3)):
        for dtypes, shape in zip(PAIRS, shapes, strict=True):
            yield _perturb, *dtypes, queries, kind, 2**31 - 6, shape
            yield _perturb_rows, dtypes[0], queries, kind, shape
    for stored, decay in product(STORED, DECAYS):
        yield _add, *stored, decay, 2, "gaussian", "masked"
        yield from ((_add_curved, *stored, decay, queries, kind) for queries, kind in few)
    for stored in STORED:
        yield _add_adam, *stored, DECAYS[1], 3, "rademacher"
        yield _add_adam_to_each, *stored, 1, "gaussian"


def noise(queries: int, kind: NoiseKind, device: torch.device, size: float = 1e-3, name: str = "w") -> dict[str, Any]:
    """Keys, coefficients of alternating signs, which cancel where two queries have one code, and kind."""
    keys = [key(0, 1, query, name) for query in range(queries)]
    coefficients = [coefficient(size * (-1) ** query, kind) for query in range(queries)]
    return {
        "keys": torch.tensor(keys, dtype=torch.int32, device=device),
        "coefficients": torch.tensor(coefficients, dtype=torch.float32, device=device),
        "kind": kind,
    }


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


def _stored(
    numel: int, dtype: torch.dtype, rest: torch.dtype | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """A weight and what completes it, some elements of which somebody has written since."""
    weight = any_bits(numel, dtype)
    if rest is None:
        return weight.to(device), None
    if rest.is_floating_point:
        low = weight.to(rest)
        low[::2] += 1e-6
    else:
        limits = torch.iinfo(rest)
        low = torch.randint(limits.min, limits.max + 1, (numel,), generator=torch.Generator().manual_seed(1)).to(rest)
    return weight.to(device), low.to(device)


def _shaped(shape: Shape, size: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """What becomes of noise: nothing; it is divided by roots, some of which are no fp32 numbers; or left out."""
    if shape == "scaled":
        return {"curvature": torch.linspace(1e-4, 3.7, math.prod(size)).view(size).to(device)}
    return {} if shape is None else {"threshold": 0.019999999552965164}  # of the numbers' standard deviation


def _perturb(
    loops: Any,
    device: torch.device,
    numel: int,
    dtype: torch.dtype,
    out: torch.dtype,
    queries: int,
    kind: NoiseKind,
    start: int,
    shape: Shape = None,
) -> Outputs:
    weight = any_bits(numel, dtype).to(device)
    one, plus, minus = torch.empty(3, numel + 3, dtype=out, device=device)[:, :numel].unbind()
    options = noise(queries, kind, device) | {"start": start} | _shaped(shape, (numel,), device)
    loops.perturb(one, weight, **options)
    loops.perturb_both(plus, minus, weight, **options)
    return one, plus, minus


def _perturb_rows(
    loops: Any,
    device: torch.device,
    numel: int,
    dtype: torch.dtype,
    queries: int,
    kind: NoiseKind,
    shape: Shape = None,
) -> Outputs:
    count = numel // 70
    table = any_bits(count * 38, dtype).view(count, 38).to(device)
    rows = (torch.arange(5 * (count // 5) + 5) * 6 % count).to(device)  # not in order, and some twice
    out = torch.empty(len(rows), 38, dtype=dtype, device=device)
    loops.perturb_rows(out, table, rows, **noise(queries, kind, device), **_shaped(shape, (len(rows), 38), device))
    return (out,)


def _add(
    loops: Any,
    device: torch.device,
    numel: int,
    dtype: torch.dtype,
    rest: torch.dtype | None,
    decay: float,
    queries: int,
    kind: NoiseKind,
    shape: Shape = None,
) -> Outputs:
    weight, low = _stored(numel, dtype, rest, device)
    options = noise(queries, kind, device) | {"decay": decay, "rest": low, "start": 2}
    loops.add(weight, **options, **_shaped(shape, (numel,), device))
    return (weight,) if low is None else (weight, low)


def _add_curved(
    loops: Any,
    device: torch.device,
    numel: int,
    dtype: torch.dtype,
    rest: torch.dtype | None,
    decay: float,
    queries: int,
    kind: NoiseKind,
) -> Outputs:
    """A curvature that grows, shrinks and comes to both ends of its range; by itself, too."""
    weight, low = _stored(numel, dtype, rest, device)
    alone, curvature = torch.linspace(1e-4, 3.7, 2 * numel).to(device).view(2, numel).unbind()
    squares = torch.tensor([1e-3 * (-1) ** query * 7**query for query in range(queries)], device=device)
    change, options = Change(-1e-3, squares, 0.01, 3.6), noise(queries, kind, device)
    loops.add_curved(weight, curvature, **options, change=change, decay=decay, rest=low, start=2)
    loops.curve(alone, options["keys"], kind, change, start=4)
    return (weight, alone, curvature) if low is None else (weight, alone, curvature, low)


def _add_adam(
    loops: Any,
    device: torch.device,
    numel: int,
    dtype: torch.dtype,
    rest: torch.dtype | None,
    decay: float,
    queries: int,
    kind: NoiseKind,
) -> Outputs:
    weight, low = _stored(numel, dtype, rest, device)
    mean, square = _moments(numel, device)
    options = noise(queries, kind, device) | {"decay": decay, "rest": low, "start": 2}
    loops.add_adam(weight, mean, square, **options, step=_ADAM)
    return (weight, mean, square) if low is None else (weight, mean, square, low)


def _add_delta(
    loops: Any, device: torch.device, numel: int, dtype: torch.dtype, rest: torch.dtype | None, decay: float
) -> Outputs:
    weight, low = _stored(numel, dtype, rest, device)
    loops.add_delta(weight, any_bits(numel, torch.float32, 2).to(device), decay, low, scale=-1.7e-3)
    return (weight,) if low is None else (weight, low)


def _perturb_each(
    loops: Any,
    device: torch.device,
    numel: int,
    dtype: torch.dtype,
    out: torch.dtype,
    queries: int,
    kind: NoiseKind,
) -> Outputs:
    """Of the tensors every second one is zero."""
    sizes = _sizes(numel)
    weights = [any_bits(size + 60, dtype, size)[:size].to(device) for size in sizes]
    outs = [torch.empty_like(weight, dtype=out) for weight in weights]
    given = [None if place % 2 else weight for place, weight in enumerate(weights)]
    loops.perturb_each(outs, given, *_noise_of_each(sizes, queries, kind, device), kind)
    return outs


def _add_to_each(
    loops: Any,
    device: torch.device,
    numel: int,
    dtype: torch.dtype,
    rest: torch.dtype | None,
    queries: int,
    kind: NoiseKind,
) -> Outputs:
    weights, rests = _several(numel, dtype, rest, device)
    noises = _noise_of_each(_sizes(numel), queries, kind, device)
    loops.add_to_each(weights, *noises, _DECAYS_OF_EACH, rests, kind)
    return [*weights, *(low for low in rests if low is not None)]


def _add_adam_to_each(
    loops: Any,
    device: torch.device,
    numel: int,
    dtype: torch.dtype,
    rest: torch.dtype | None,
    queries: int,
    kind: NoiseKind,
) -> Outputs:
    weights, rests = _several(numel, dtype, rest, device)
    means, squares = zip(*(_moments(len(weight), device) for weight in weights), strict=True)
    noises = _noise_of_each(_sizes(numel), queries, kind, device)
    loops.add_adam_to_each(weights, means, squares, *noises, _DECAYS_OF_EACH, rests, kind, _ADAM)
    return [*weights, *means, *squares, *(low for low in rests if low is not None)]


def _moments(numel: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """As large as gradients of a thousandth make them, zeros among them."""
    mean = torch.linspace(-1e-3, 1e-3, numel).to(device)
    return mean, mean.square().flip(0)


def _add_delta_to_each(
    loops: Any, device: torch.device, numel: int, dtype: torch.dtype, rest: torch.dtype | None
) -> Outputs:
    weights, rests = _several(numel, dtype, rest, device)
    deltas = [any_bits(len(weight) + 60, torch.float32, len(weight))[: len(weight)].to(device) for weight in weights]
    loops.add_delta_to_each(weights, deltas, _DECAYS_OF_EACH, rests, -1.7e-3)
    return [*weights, *(low for low in rests if low is not None)]


def _several(
    numel: int, dtype: torch.dtype, rest: torch.dtype | None, device: torch.device
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and what completes them; one is not aligned."""
    weights, rests = [], []
    for place, size in enumerate(_sizes(numel)):
        first = int(place == 4)
        weight, low = _stored(size + 60, dtype, rest, device)
        weights.append(weight[first : first + size])
        rests.append(None if low is None else low[first : first + size])
    return weights, rests


def _sizes(numel: int) -> tuple[int, ...]:
    """Of several tensors: none, some and many elements, multiples of 16 and not."""
    return 32, 0, 3 * numel // 16 * 16, 37, 16, numel, 2 * numel // 16 * 16, 48


def _noise_of_each(
    sizes: Sequence[int], queries: int, kind: NoiseKind, device: torch.device
) -> tuple[Sequence[Tensor], list[Tensor]]:
    """Keys, rows of one table, and one table of coefficients."""
    each = [noise(queries, kind, CPU, name=str(size)) for size in sizes]
    return torch.stack([one["keys"] for one in each]).to(device).unbind(), [each[0]["coefficients"].to(device)] * 8


def _perturb_huge(device: torch.device, elements: int, start: int) -> Outputs:
    weight = torch.full((elements,), 0.02, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(weight)
    kernels.perturb(out, weight, **noise(1, "gaussian", device), start=start)
    return [out[-TAIL:].clone()]


def _update_huge(device: torch.device, elements: int, start: int) -> Outputs:
    weight = torch.full((elements,), 0.02, dtype=torch.bfloat16, device=device)
    low_word = torch.zeros_like(weight, dtype=torch.int16)
    kernels.add(weight, **noise(1, "gaussian", device, 1e-5), decay=DECAYS[1], rest=low_word, start=start)
    return [weight[-TAIL:].clone(), low_word[-TAIL:].clone()]


def _update_each_huge(device: torch.device, elements: int, start: int) -> Outputs:
    """As one of several, which begin with element 0 each: the last elements of the whole are what is expected."""
    if start:
        return _update_huge(device, elements, start)
    weight = torch.full((elements,), 0.02, dtype=torch.bfloat16, device=device)
    low_word = torch.zeros_like(weight, dtype=torch.int16)
    keys, coefficients, kind = noise(1, "gaussian", device, 1e-5).values()
    kernels.add_to_each([weight], [keys], [coefficients], [DECAYS[1]], [low_word], kind)
    return [weight[-TAIL:].clone(), low_word[-TAIL:].clone()]


def _compare(case: Case, loops: Any, elements: int, device: torch.device) -> int:
    return _differing(case(loops, device, elements), case(kernels, CPU, elements))


def _compare_huge(case: Callable[[torch.device, int, int], Outputs], elements: int, device: torch.device) -> int:
    return _differing(case(device, elements, 0), case(CPU, TAIL, elements - TAIL))


def _differing(ours: Outputs, expected: Outputs) -> int:
    """Elements with other bits, but for those that are NaN in both."""
    count = 0
    for one, other in zip(ours, expected, strict=True):
        one = one.cpu()
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[one.element_size()]
        is_other = one.contiguous().view(integer) != other.contiguous().view(integer)
        if one.is_floating_point():
            is_other &= ~(one.isnan() & other.isnan())
        count += int(is_other.sum())
    return count
