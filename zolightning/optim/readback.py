"""Copies numbers from a device to the host ahead of their use, so that the host does not wait for them."""

import math
from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor


class LargestElements:
    """The largest absolute value of each of some tensors, copied to the host without waiting for it.

    Reading a number from a GPU waits for all the work queued before it. A copy that is started at the end of a step
    has arrived when the next one begins. The tensors may be freed meanwhile.
    """

    def __init__(self) -> None:
        self._tensors: list[ref[Tensor]] = []
        self._found: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def ask(self, tensors: list[Tensor]) -> None:
        """Starts the copy for these tensors, which must not change before :meth:`of` is called; drops earlier ones."""
        self._tensors, self._found, self._copied = [], None, None
        if tensors:
            device = tensors[0].device
            found = torch.stack([largest.to(device) for largest in _largest(tensors)])
            self._tensors = [ref(tensor) for tensor in tensors]
            self._found = found.to("cpu", non_blocking=device.type == "cuda")
            if device.type == "cuda":
                self._copied = torch.cuda.Event()
                self._copied.record(torch.cuda.current_stream(device))

    def of(self, tensors: list[Tensor]) -> list[float]:
        """The largest absolute value of each; waits for the device unless these tensors were asked for before."""
        asked = [tensor() for tensor in self._tensors]
        if len(tensors) != len(asked) or any(a is not b for a, b in zip(tensors, asked, strict=True)):
            self.ask(tensors)
        if self._copied is not None:
            self._copied.synchronize()
        return [] if self._found is None else self._found.tolist()


def _largest(tensors: list[Tensor]) -> Sequence[Tensor]:
    """The largest absolute value of each: on a GPU in few launches, which take ten times as long on a CPU."""
    if tensors[0].device.type == "cpu":
        return [tensor.abs().max() for tensor in tensors]
    return torch._foreach_norm(tensors, ord=math.inf)
