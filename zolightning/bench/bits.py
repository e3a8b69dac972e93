"""Whether the loops over parameters write the same bits on a device, or in another backend, as on the CPU."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from zolightning import kernels
from zolightning.bench.loop_runs import DECAYS, LoopRuns, Outputs, Shape, noise
from zolightning.bench.measure import CPU
from zolightning.kernels.noise import NOISE_KINDS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = (*((dtype, dtype) for dtype in DTYPES), (torch.float32, torch.bfloat16))  # of a weight, and of a perturbed one
# Of a weight, and of what completes it to float32: nothing, low words or low bytes, or a master copy
STORED: tuple[tuple[torch.dtype, torch.dtype | None], ...] = (
    *((dtype, None) for dtype in DTYPES),
    (torch.bfloat16, torch.int16),
    (torch.bfloat16, torch.int8),
    (torch.float16, torch.float32),
)
HUGE = 2**31 + 16  # elements: more than int32 counts
TAIL = 1008


def comparisons(
    elements: int, huge: int | None, loops: Any = kernels
) -> Iterator[tuple[str, Callable[[torch.device], int]]]:
    """Names of comparisons, each with a function of a device.

    The function returns how many of the elements that a loop writes on the device have different bits than on the CPU.

    Args:
        elements: number of elements of the tensors; an odd number is best.
        huge: number of elements, a multiple of 16, in three more cases that compare the last elements only; None: no
            such cases.
        loops: a backend, or :mod:`zolightning.kernels`, which chooses one; cases of functions that it lacks are left
            out.
    """
    if huge is not None:
        for update in (_perturb_huge, _update_huge, _update_each_huge):
            yield f"{update.__name__.strip('_')}, the last of {huge} elements", partial(_compare_huge, update, huge)
    for run, *arguments in _cases():
        if hasattr(loops, "for_each" if run.__name__.endswith("_each") else run.__name__):
            said = ", ".join(str(argument).removeprefix("torch.") for argument in arguments)
            yield f"{run.__name__} {said}", partial(_compare, run, arguments, loops, elements)


def _cases() -> Iterator[tuple[Any, ...]]:
    """Tuples of a method of LoopRuns and its arguments.

    The loops that steps use most come first: a device compiles a loop or two for each case, and may not get to the end.
    """
    few = tuple(zip((1, 3), NOISE_KINDS, strict=True))
    one, *more = product((1, 2, 3), NOISE_KINDS)
    starts = {1: 2**31 - 6, 2: 2**32 - 2**8, 3: 0}
    yield from ((LoopRuns.perturb, *dtypes, *one, starts[1]) for dtypes in PAIRS)
    yield from ((LoopRuns.perturb_each, *dtypes, *noises) for noises, dtypes in product(few, PAIRS))
    yield from ((LoopRuns.add_to_each, *dtypes, *noises) for noises, dtypes in product(few, STORED))
    yield from ((LoopRuns.perturb_rows, dtype, *one) for dtype in DTYPES)
    yield from ((LoopRuns.add, *dtypes, decay, *noises) for noises, dtypes, decay in product(few, STORED, DECAYS))
    for queries, kind in more:
        yield from ((LoopRuns.perturb, *dtypes, queries, kind, starts[queries]) for dtypes in PAIRS)
        yield from ((LoopRuns.perturb_rows, dtype, queries, kind) for dtype in DTYPES)
    yield from ((LoopRuns.add_delta, *dtypes, decay) for dtypes, decay in product(STORED, DECAYS))
    yield from ((LoopRuns.add_delta_to_each, *dtypes) for dtypes in STORED)
    yield from ((LoopRuns.add_curved_to_each, *dtypes, *few[place % 2]) for place, dtypes in enumerate(STORED))
    yield from ((LoopRuns.add, *dtypes, 1.0, 5, "gaussian") for dtypes in STORED)  # by a loop over queries
    shapes: tuple[Shape, ...] = ("scaled", "masked", "scaled", "masked")
    for kind, queries in product(NOISE_KINDS, (1, 2, 3)):
        for dtypes, shape in zip(PAIRS, shapes, strict=True):
            yield LoopRuns.perturb, *dtypes, queries, kind, 2**31 - 6, shape
            yield LoopRuns.perturb_rows, dtypes[0], queries, kind, shape
        yield LoopRuns.perturb_each, *PAIRS[queries], queries, kind, "scaled"
    for stored, decay in product(STORED, DECAYS):
        yield LoopRuns.add, *stored, decay, 2, "gaussian", "masked"
        yield from ((LoopRuns.add_curved, *stored, decay, queries, kind) for queries, kind in few)
    for stored in STORED:
        yield LoopRuns.add_to_each, *stored, 2, "rademacher", True
        yield LoopRuns.add_adam, *stored, DECAYS[1], 3, "rademacher"
        yield LoopRuns.add_adam_to_each, *stored, 1, "gaussian"


def _perturb_huge(device: torch.device, elements: int, start: int) -> Outputs:
    weight = torch.full((elements,), 0.02, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(weight)
    kernels.perturb(out, weight, noise(1, "gaussian", device), start=start)
    return [out[-TAIL:].clone()]


def _update_huge(device: torch.device, elements: int, start: int) -> Outputs:
    weight = torch.full((elements,), 0.02, dtype=torch.bfloat16, device=device)
    low_word = torch.zeros_like(weight, dtype=torch.int16)
    kernels.add(weight, noise(1, "gaussian", device, 1e-5), DECAYS[1], low_word, start=start)
    return [weight[-TAIL:].clone(), low_word[-TAIL:].clone()]


def _update_each_huge(device: torch.device, elements: int, start: int) -> Outputs:
    """An update by ``for_each``, which always begins with element 0; the expected last elements come from `add`."""
    if start:
        return _update_huge(device, elements, start)
    weight = torch.full((elements,), 0.02, dtype=torch.bfloat16, device=device)
    low_word = torch.zeros_like(weight, dtype=torch.int16)
    call = {"weight": weight, "noise": noise(1, "gaussian", device, 1e-5), "extra_bits": low_word, "decay": DECAYS[1]}
    kernels.for_each(kernels.add, [call])
    return [weight[-TAIL:].clone(), low_word[-TAIL:].clone()]


def _compare(
    run: Callable[..., Outputs], arguments: Sequence[Any], loops: Any, elements: int, device: torch.device
) -> int:
    ours, expected = LoopRuns(loops, device, elements), LoopRuns(kernels, CPU, elements)
    return _differing(run(ours, *arguments), run(expected, *arguments))


def _compare_huge(case: Callable[[torch.device, int, int], Outputs], elements: int, device: torch.device) -> int:
    return _differing(case(device, elements, 0), case(CPU, TAIL, elements - TAIL))


def _differing(ours: Outputs, expected: Outputs) -> int:
    """Number of elements with different bits, without those that are NaN in both."""
    count = 0
    for one, other in zip(ours, expected, strict=True):
        one = one.cpu()
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[one.element_size()]
        is_other = one.contiguous().view(integer) != other.contiguous().view(integer)
        if one.is_floating_point():
            is_other &= ~(one.isnan() & other.isnan())
        count += int(is_other.sum())
    return count
