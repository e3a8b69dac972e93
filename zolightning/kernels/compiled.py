"""Runs a loop of torch operations: compiled over large tensors, eagerly and in chunks over small ones.

A kernel is a plain function of tensors that writes its outputs in place, element by element. ``torch.compile`` turns it
into one loop instead of thirty passes over memory. Where it does not work, the kernel runs on chunks that stay in the
cache. Both give the same bits. CPUs with a C compiler use :mod:`zolightning.kernels.native` instead.
"""

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**16  # elements of an eager chunk: temporaries of 256 KiB stay in the second-level cache
DEVICE_CHUNK = 2**22  # on devices other than CPUs, where each operation is a launch that takes microseconds
COMPILE_FROM = 2**20  # elements: below it a process may end before compilation has paid for itself

Kernel = Callable[..., None]


class _Compiler:
    """The state of this module.

    Attributes:
        enabled: whether kernels may be compiled: not after a failure, nor if the environment disables it.
        warm: whether a kernel has been compiled, after which small tensors use compiled kernels too.
        warned: whether there has been a warning that a faster way does not work.
    """

    enabled: bool = os.environ.get("ZOLIGHTNING_COMPILE", "1") != "0"
    warm: bool = False
    warned: bool = False


def kernel(function: Kernel, like: Tensor) -> tuple[Kernel, int]:
    """`function` as it should be run on tensors like `like`, and how many elements to give it at once."""
    if _Compiler.enabled and not like.is_meta and (_Compiler.warm or like.numel() >= COMPILE_FROM):
        return _guarded(function), 2**30
    return function, chunk_size(like)


def chunk_size(like: Tensor) -> int:
    """How many elements of tensors like `like` an eager loop takes at once."""
    if like.device.type == "meta":  # only shapes, at no cost per element
        return 2**30
    return CHUNK if like.device.type == "cpu" else DEVICE_CHUNK


@functools.cache
def _compiled(function: Kernel) -> Kernel:
    # The option keeps GPUs from fusing a product and a sum, which would round once instead of twice.
    return torch.compile(function, dynamic=True, options={"emulate_precision_casts": True})


def _guarded(function: Kernel) -> Kernel:
    def run(*args: Any) -> None:
        try:
            _compiled(function)(*args)
            _Compiler.warm = True
        except Exception as error:
            if _Compiler.warm:
                raise
            # Nothing has been written: the first compilation failed, before its first run.
            _Compiler.enabled = False
            slower("torch.compile", error)
            function(*args)

    return run


def slower(missing: str, error: Exception) -> None:
    """Warns that `missing` does not work, unless there has already been a warning that a faster way does not work."""
    if not _Compiler.warned:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        warnings.warn(
            f"{missing} is not usable here ({reason}); noise is made by PyTorch: "
            "the same numbers, several times slower.",
            stacklevel=3,
        )
    _Compiler.warned = True


def chunks(numel: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` elements; of no elements one that is empty.

    A rank may have no rows of a small parameter, but it has the same entries of its state as other ranks.
    """
    return (slice(start, min(start + size, numel)) for start in range(0, max(numel, 1), size))
