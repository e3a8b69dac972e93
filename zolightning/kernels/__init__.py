"""The loops over parameters: perturbations and updates, which are all that a step does besides its forward passes.

Each function of this module exists once in each backend, with the same arguments and the same bits. It works in place
on flat, contiguous tensors of one device:

* :mod:`~zolightning.kernels.native`: C, for CPUs;
* :mod:`~zolightning.kernels.triton_loops`: Triton, for CUDA devices;
* :mod:`~zolightning.kernels.torch_loops`: PyTorch, compiled where that works, for everything else.

They add :class:`~zolightning.kernels.noise.Noise` from its element ``start`` on, where ``start`` is the index of a
tensor's first element in its parameter. Noise may be changed before it is added: divided by the root of a
``curvature``, element by element (positive, of the weight's shape and the dtype of the arithmetic), or left out where
the absolute value of the stored weight is above a ``threshold``.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from zolightning.kernels import compiled, native, torch_loops
from zolightning.kernels.adam import AdamStep
from zolightning.kernels.curvature import Change
from zolightning.kernels.noise import Noise


def _backend(first: Tensor, *others: Tensor | None, start: int = 0) -> ModuleType:
    """The fastest backend for these tensors; `start` is the index of the first element of `first`."""
    if native.available(first, *others, start=start):
        return native
    if first.device.type == "cuda":
        triton_loops = _triton_loops()
        if triton_loops is not None and triton_loops.available(first, *others, start=start):
            return triton_loops
    return torch_loops


@functools.cache
def _triton_loops() -> ModuleType | None:
    """The loops in Triton, which is imported only if there is a CUDA device for it; None where it does not work."""
    if os.environ.get("ZOLIGHTNING_TRITON", "1") == "0":
        return None
    try:
        from zolightning.kernels import triton_loops

        one = torch.ones(2, device="cuda")  # only running a kernel shows whether driver, compiler and card support it
        triton_loops.perturb(one, one, Noise(torch.ones(1, 2, dtype=torch.int32, device="cuda"), one[:1], "gaussian"))
    except Exception as error:
        compiled.slower("Triton", error)
        return None
    return triton_loops


def _master(extra_bits: Tensor | None, backend: ModuleType) -> Tensor | None:
    """The fp32 master of an fp16 weight, if it is to move instead of the weight: on a CPU in C, which has no fp16."""
    is_master = extra_bits is not None and extra_bits.dtype == torch.float32
    return extra_bits if is_master and backend is torch_loops else None


@contextmanager
def _moving(weight: Tensor, master: Tensor) -> Iterator[None]:
    """A context in which a master moves: it first takes over what others wrote to the weight, which then follows."""
    torch_loops.take_over(weight, master)
    yield
    weight.copy_(master)


def perturb(
    out: Tensor,
    weight: Tensor | None,
    noise: Noise,
    start: int = 0,
    curvature: Tensor | None = None,
    threshold: float | None = None,
) -> None:
    """``out = weight + noise``, all of one shape; the dtype of `out` may be narrower than that of `weight`.

    A weight of None counts as zeros.
    """
    weight = torch.zeros_like(out) if weight is None else weight
    backend = _backend(weight, out, curvature, start=start)
    backend.perturb(out, weight, noise, start, curvature, threshold)


def perturb_both(
    plus: Tensor,
    minus: Tensor,
    weight: Tensor,
    noise: Noise,
    start: int = 0,
    curvature: Tensor | None = None,
    threshold: float | None = None,
) -> None:
    """``plus = weight + noise`` and ``minus = weight - noise``, of one shape, from one read of the weight.

    `minus` has the bits that :func:`perturb` gives with negated coefficients, zeros' signs included. A backend takes
    noise of one query here: a sum of several that cancels is +0 with negated terms too, which one sign does not make.
    """
    if noise.keys.shape[0] > 1:  # in no evaluation of this package's methods
        perturb(plus, weight, noise, start, curvature, threshold)
        perturb(minus, weight, -noise, start, curvature, threshold)
        return
    backend = _backend(weight, plus, curvature, start=start)
    backend.perturb_both(plus, minus, weight, noise, start, curvature, threshold)


def perturb_rows(
    out: Tensor,
    table: Tensor,
    rows: Tensor,
    noise: Noise,
    curvature: Tensor | None = None,
    threshold: float | None = None,
) -> None:
    """``out = (table + noise)[rows]``, reading and generating only these rows.

    Args:
        out: (k, n), contiguous, of the dtype of `table`.
        table: (m, n), contiguous.
        rows: integers, (k,).
        noise: see the module's docstring, also for `threshold`.
        curvature: the curvature of these rows, (k, n), contiguous.

    Raises:
        IndexError: if a row is not in the table (on CPUs; Triton writes NaNs instead, so that the loss becomes NaN).
    """
    backend = _backend(out, curvature, start=table.shape[1])
    backend.perturb_rows(out, table, rows, noise, curvature, threshold)


def add(
    weight: Tensor,
    noise: Noise,
    decay: float = 1.0,
    extra_bits: Tensor | None = None,
    start: int = 0,
    threshold: float | None = None,
) -> None:
    """``weight = decay * weight + noise``, (n,).

    Args:
        weight: any floating-point dtype; rounded once, at the end.
        noise: see the module's docstring, also for `start` and `threshold`.
        decay: multiplies the weight first.
        extra_bits: the extra bits of a half-precision weight, (n,), if any are kept: the low words (int16) or low bytes
            (int8) of a bf16 weight (:mod:`~zolightning.kernels.bfloat16`), or the float32 master copy of an fp16
            weight, which first takes over what others have written to the weight.
    """
    backend = _backend(weight, start=start)
    if (master := _master(extra_bits, backend)) is not None:
        with _moving(weight, master):
            if threshold is None:
                add(master, noise, decay, start=start)
            else:
                torch_loops.add_to_master(master, weight, noise, decay, start, threshold)
        return
    backend.add(weight, noise, decay, extra_bits, start, threshold)


def add_curved(
    weight: Tensor,
    curvature: Tensor,
    noise: Noise,
    change: Change,
    decay: float = 1.0,
    extra_bits: Tensor | None = None,
    start: int = 0,
) -> None:
    """Changes a curvature, and then ``weight = decay * weight + noise / sqrt(curvature)``, both (n,), in one pass.

    Args:
        weight: see :func:`add`, also for `noise`, `decay`, `extra_bits` and `start`.
        curvature: float32, or float64 for double-precision weights.
        change: the change of the curvature.
    """
    backend = _backend(weight, curvature, start=start)
    if (master := _master(extra_bits, backend)) is not None:
        with _moving(weight, master):
            add_curved(master, curvature, noise, change, decay, start=start)
        return
    backend.add_curved(weight, curvature, noise, change, decay, extra_bits, start)


def add_adam(
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    noise: Noise,
    step: AdamStep,
    decay: float = 1.0,
    extra_bits: Tensor | None = None,
    start: int = 0,
) -> None:
    """One step of Adam, in which the noise is the gradient: moves both moments and then the weight, (n,), in one pass.

    Args:
        weight: see :func:`add`, also for `noise`, `decay`, `extra_bits` and `start`.
        mean: the first moment, float32, or float64 for double-precision weights.
        square: the second moment, likewise.
        step: Adam's coefficients in this step.
    """
    backend = _backend(weight, mean, start=start)
    if (master := _master(extra_bits, backend)) is not None:
        with _moving(weight, master):
            add_adam(master, mean, square, noise, step, decay, start=start)
        return
    backend.add_adam(weight, mean, square, noise, step, decay, extra_bits, start)


def curve(curvature: Tensor, noise: Noise, change: Change, start: int = 0) -> None:
    """Changes a curvature, (n,), as :func:`add_curved` does."""
    _backend(curvature, start=start).curve(curvature, noise, change, start)


def add_delta(
    weight: Tensor, delta: Tensor, decay: float = 1.0, extra_bits: Tensor | None = None, scale: float = 1.0
) -> None:
    """``weight = decay * weight + scale * delta``, (n,), for a stored `delta` instead of noise.

    Args:
        weight: any floating-point dtype; rounded once, at the end.
        delta: float32, or float64 for double-precision weights.
        decay: multiplies the weight first.
        extra_bits: see :func:`add`.
        scale: multiplies `delta` first.
    """
    _backend(weight).add_delta(weight, delta, decay, extra_bits, scale)


def for_each(loop: Callable[..., None], calls: Iterable[Mapping[str, Any]]) -> None:
    """Calls a loop once with each of these arguments; on a GPU in few launches, as small tensors do not fill one.

    Args:
        loop: ``perturb``, ``add``, ``add_curved``, ``add_adam`` or ``add_delta`` of this module.
        calls: the arguments of each call by name, the same names in all of them. Tensors may have any dtype and device;
            no two calls may write to the same memory.
    """
    together = []
    written = "out" if loop is perturb else "weight"
    backends: dict[tuple[torch.device, torch.dtype, int], ModuleType] = {}
    for call in calls:
        out, start = call[written], call.get("start", 0)
        kind = out.device, out.dtype, start % 2
        if kind not in backends:
            backends[kind] = _backend(out, start=start)
        if out.device.type == "cuda" and backends[kind] is not torch_loops:
            together.append(call)
        else:
            loop(**call)
    triton_loops = _triton_loops() if together else None
    if triton_loops is not None:
        triton_loops.for_each(getattr(triton_loops, loop.__name__), together)
