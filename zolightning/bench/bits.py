"""Whether the loops over parameters write the same bits on a device as on the CPU."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from zolightning import kernels
from zolightning.bench.measure import CPU
from zolightning.kernels.noise import NoiseKind, coefficient, key

# What completes a weight to float32: nothing, low words or low bytes, or a master copy
RESTS: dict[torch.dtype, tuple[torch.dtype | None, ...]] = {
    torch.bfloat16: (None, torch.int16, torch.int8),
    torch.float32: (None,),
    torch.float16: (None, torch.float32),
}
COLUMNS = 38  # of the table whose rows are perturbed
DECAYS = (1.0, 1 - 1e-4)
HUGE = 2**31 + 5  # elements: more than int32 counts
TAIL = 1003

Outputs = list[Tensor]


def comparisons(elements: int, huge: int | None = HUGE) -> Iterator[tuple[str, Callable[[torch.device], int]]]:
    """Names, and what says how many of the elements that a loop writes on a device are not those of the CPU.

    Args:
        elements: of the tensors; an odd number is best.
        huge: elements of two more cases, whose last ones are compared; none where None.
    """
    for name, case in _cases(elements):
        yield name, partial(_compare, case)
    if huge is not None:
        for name, huge_case in (("perturb", _perturb_huge), ("update exact", _update_huge)):
            yield f"{name}, the last of {huge} elements", partial(_compare_huge, huge_case, huge)


def _compare(case: Callable[[torch.device], Outputs], device: torch.device) -> int:
    return _differing(case(device), case(CPU))


def _compare_huge(case: Callable[[torch.device, int, int], Outputs], elements: int, device: torch.device) -> int:
    return _differing(case(device, elements, 0), case(CPU, TAIL, elements - TAIL))


def noise(queries: int, kind: NoiseKind, device: torch.device, size: float = 1e-3) -> dict[str, Any]:
    """Keys, coefficients of alternating signs, and kind: what selects a sum of directions."""
    keys = [key(0, 1, query, "weight") for query in range(queries)]
    coefficients = [coefficient(size * (-1) ** query, kind) for query in range(queries)]
    return {
        "keys": torch.tensor(keys, dtype=torch.int32, device=device),
        "coefficients": torch.tensor(coefficients, dtype=torch.float32, device=device),
        "kind": kind,
    }


def _cases(elements: int) -> Iterator[tuple[str, Callable[[torch.device], Outputs]]]:
    for dtype, kind, queries in itertools.product(RESTS, get_args(NoiseKind), (1, 3)):
        about = f"{str(dtype).removeprefix('torch.')}, {kind}, {queries} queries"
        weight = _weights(elements, dtype)
        for start in (0, 2**31 - 1000):
            yield f"perturb, {about}, from {start}", partial(_perturb, weight, kind, queries, start)
        yield f"rows, {about}", partial(_perturb_rows, weight, kind, queries)
        for decay, rest in itertools.product(DECAYS, RESTS[dtype]):
            beside = "" if rest is None else f" beside {str(rest).removeprefix('torch.')}"
            yield f"update{beside}, {about}, decay {decay}", partial(_update, weight, kind, queries, decay, rest)


def _perturb(weight: Tensor, kind: NoiseKind, queries: int, start: int, device: torch.device) -> Outputs:
    moved, arguments = weight.to(device), noise(queries, kind, device)
    one, plus, minus = (torch.empty_like(moved) for _ in range(3))
    kernels.perturb(one, moved, **arguments, start=start)
    kernels.perturb_both(plus, minus, moved, **arguments, start=start)
    return [one, plus, minus]


def _perturb_rows(weight: Tensor, kind: NoiseKind, queries: int, device: torch.device) -> Outputs:
    table = weight[: len(weight) // COLUMNS * COLUMNS].view(-1, COLUMNS).to(device)
    rows = torch.arange(0, len(table), 3).flip(0).to(device)
    out = torch.empty(len(rows), COLUMNS, dtype=weight.dtype, device=device)
    kernels.perturb_rows(out, table, rows, **noise(queries, kind, device))
    return [out]


def _update(
    weight: Tensor, kind: NoiseKind, queries: int, decay: float, rest: torch.dtype | None, device: torch.device
) -> Outputs:
    moved = weight.to(device, copy=True)
    beside = None if rest is None else moved.to(rest) if rest.is_floating_point else torch.zeros_like(moved, dtype=rest)
    for _ in range(3):
        kernels.add(moved, **noise(queries, kind, device, 1e-5), decay=decay, rest=beside)
    return [moved] if beside is None else [moved, beside]


def _weights(elements: int, dtype: torch.dtype) -> Tensor:
    """Numbers like those of a model, and a few that no model should have."""
    weight = (torch.randn(elements, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    limits = torch.finfo(dtype)
    special = [0.0, -0.0, limits.tiny, limits.tiny / 2, -limits.tiny / 4, limits.max, float("inf"), float("nan")]
    weight[7 : 7 + len(special)] = torch.tensor(special, dtype=torch.float64).to(dtype)
    return weight


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


def _differing(ours: Outputs, expected: Outputs) -> int:
    """Elements with other bits, but for those that are NaN in both."""
    count = 0
    for one, other in zip(ours, expected, strict=True):
        one = one.cpu()
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[one.element_size()]
        is_other = one.view(integer) != other.view(integer)
        if one.is_floating_point():
            is_other &= ~(one.isnan() & other.isnan())
        count += int(is_other.sum())
    return count
