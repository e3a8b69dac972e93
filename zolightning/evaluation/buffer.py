"""A piece of memory that one tensor after another uses."""

import torch
from torch import nn


class Buffer:
    """Bytes that grow to the size of the largest tensor asked for, and the tensors made of them so far."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)
        self._made: dict[tuple[torch.Size, torch.dtype, bool], nn.Parameter] = {}

    def tensor(self, shape: torch.Size, dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
        """A contiguous parameter in this memory, the same object for the same arguments.

        Torch takes different paths for weights that require gradients (matmul folds its batch), hence the last
        argument.
        """
        found = self._made.get((shape, dtype, requires_grad))
        return self._make(shape, dtype, requires_grad) if found is None else found

    @torch.inference_mode(False)  # the first reader may be in that mode and later ones not
    def _make(self, shape: torch.Size, dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
        size = shape.numel() * dtype.itemsize
        if size > len(self._bytes):
            self._made.clear()
            del self._bytes  # freed before there is more
            self._bytes = torch.empty(size, dtype=torch.uint8, device=self.device)
        made = nn.Parameter(self._bytes[:size].view(dtype).view(shape), requires_grad)
        self._made[shape, dtype, requires_grad] = made
        return made

    def holds(self, output: object) -> bool:
        """Whether what a function returned may lie in this memory."""
        if isinstance(output, list | tuple):
            return any(self.holds(value) for value in output)
        if output is None or isinstance(output, bool | int | float):
            return False
        try:
            return output.untyped_storage().data_ptr() == self._bytes.data_ptr()  # type: ignore[attr-defined]
        except (AttributeError, NotImplementedError):  # not a tensor, or one without memory of its own (vmap, sparse)
            return True
