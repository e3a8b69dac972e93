"""What the host will want to know of tensors on a device, copied early, so that it need not wait for the device."""

import math

import torch
from torch import Tensor


class LargestElements:
    """The largest absolute value of each of some tensors, on its way to the host.

    To read a number from a GPU at once is to wait until it has done all that it was told before. Asked for at the end
    of a step, these have arrived when the next one begins.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._found: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def ask(self, tensors: list[Tensor]) -> None:
        """Begins to find out, of tensors that nobody writes to before :meth:`of` is called; forgets others."""
        self.forget()
        if tensors:
            device = tensors[0].device
            found = torch.stack([norm.to(device) for norm in torch._foreach_norm(tensors, ord=math.inf)])
            self._tensors, self._found = tensors, found.to("cpu", non_blocking=device.type == "cuda")
            if device.type == "cuda":
                self._copied = torch.cuda.Event()
                self._copied.record(torch.cuda.current_stream(device))

    def of(self, tensors: list[Tensor]) -> list[float]:
        """The largest element of each. Where others were asked for, or nothing was, the device is waited for."""
        if len(tensors) != len(self._tensors) or any(a is not b for a, b in zip(tensors, self._tensors, strict=True)):
            self.ask(tensors)
        if self._copied is not None:
            self._copied.synchronize()
        return [] if self._found is None else self._found.tolist()

    def forget(self) -> None:
        """Lets go of the tensors."""
        self._tensors, self._found, self._copied = [], None, None
