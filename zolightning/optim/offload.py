"""Keeps the extra bits of half-precision weights in host memory.

Only updates read and write the low words of bf16 weights (or the fp32 masters of fp16 ones). A method that adds its
updates to the weights every hundred steps can keep them in host memory, and move them to the device and back, piece by
piece, when it does: for a model of 7 billion bf16 parameters 13.5 GB each way, half a second at 25 GB/s. (Torch
allocates pinned memory in powers of two, so up to twice as much of the host's memory is taken.)
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from zolightning.optim.precision import State, UpdatePrecision, add_tensor


def add_offloaded(
    weight: Tensor, host: State, pieces: Iterable[tuple[int, Tensor]], precision: UpdatePrecision
) -> None:
    """Adds an update to a weight piece by piece, with the bits of :func:`~zolightning.optim.precision.add_tensor`.

    Args:
        weight, precision: as for that function; the weight has n elements.
        host: its low word or master, (n,), in host memory; made there at the first update, pinned for a GPU.
        pieces: for each piece the index of its first element and the update, (k,), float32. Together they cover the
            weight. Only one of them is on the device at a time.
    """
    before = dict(host)
    for start, delta in pieces:
        part = slice(start, start + delta.numel())
        on_device = {name: bits[part].to(weight.device, non_blocking=True, copy=True) for name, bits in before.items()}
        add_tensor(weight.view(-1)[part], on_device, delta, precision)
        for name, bits in on_device.items():
            if name not in host:
                host[name] = _empty(weight.numel(), bits.dtype, weight.device)
            host[name][part].copy_(bits, non_blocking=True)
    if weight.is_cuda:
        torch.cuda.current_stream(weight.device).synchronize()  # from here on the host may read its copy


def to_host(value: Tensor, device: torch.device) -> Tensor:
    """A copy of a flat tensor in host memory, pinned where `device`, whose weights it belongs to, is a GPU."""
    return _empty(value.numel(), value.dtype, device).copy_(value)


def _empty(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    is_cuda = device.type == "cuda"
    return torch.empty(numel, dtype=dtype, device="cpu" if is_cuda else device, pin_memory=is_cuda)
