"""What completes half-precision weights, in host memory: on the device only piece by piece, while updates are added.

Low words (or fp16's fp32 masters) are read and written by updates alone. A method that adds updates every hundred steps
can leave them where memory is cheap, and pay one transfer each way for it: 13.5 GB for the low words of a model of
7 billion parameters, half a second at 25 GB/s. (Torch takes pinned memory in blocks of powers of two, so the host gives
up to twice as much.)
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from zolightning.optim.precision import State, UpdatePrecision, add_tensor


def add_offloaded(
    weight: Tensor, host: State, pieces: Iterable[tuple[int, Tensor]], precision: UpdatePrecision
) -> None:
    """Adds pieces to a weight as :func:`~zolightning.optim.precision.add_tensor` does: the same bits.

    Args:
        weight: the parameter's data, n elements in any shape, contiguous.
        host: its low word or master, (n,), in host memory; made there, pinned where the weight is on a GPU, at the
            first update.
        pieces: index of the first element and what is added to it and those after it, (k,), float32; together all of
            the weight. No more than one of them is on the device at a time.
        precision: how sums are rounded.
    """
    before = dict(host)
    for start, delta in pieces:
        part = slice(start, start + delta.numel())
        on_device = {name: rest[part].to(weight.device, non_blocking=True, copy=True) for name, rest in before.items()}
        add_tensor(weight.view(-1)[part], on_device, delta, precision)
        for name, rest in on_device.items():
            if name not in host:
                host[name] = _empty(weight.numel(), rest.dtype, weight.device)
            host[name][part].copy_(rest, non_blocking=True)
    if weight.is_cuda:
        torch.cuda.current_stream(weight.device).synchronize()  # the host may read what it holds


def to_host(value: Tensor, device: torch.device) -> Tensor:
    """A copy of a flat tensor in host memory, pinned where `device`, whose weights it belongs to, is a GPU."""
    return _empty(value.numel(), value.dtype, device).copy_(value)


def _empty(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    is_cuda = device.type == "cuda"
    return torch.empty(numel, dtype=dtype, device="cpu" if is_cuda else device, pin_memory=is_cuda)
