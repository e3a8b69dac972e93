"""Memory that perturbed weights lie in while they are read, the same for one layer after another."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

# A larger matrix is perturbed and multiplied in pieces of rows: an output layer has as many as the vocabulary.
PIECE_BYTES = 64 * 2**20


class Buffer:
    """Bytes that grow to the largest tensor asked for, and the tensors that have been made of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)
        self._made: dict[tuple[torch.Size, torch.dtype, bool], nn.Parameter] = {}

    def tensor(self, shape: torch.Size, dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
        """A contiguous parameter in this memory, the same object for the same arguments.

        Torch takes other paths for weights that require gradients (matmul folds its batch), hence the last argument.
        """
        found = self._made.get((shape, dtype, requires_grad))
        return self._make(shape, dtype, requires_grad) if found is None else found

    @torch.inference_mode(False)  # whoever reads it first may be in that mode, and others not
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


class Scratch:
    """Buffers to take, one for each perturbed weight that a function reads, and to give back after it."""

    def __init__(self) -> None:
        self._free: dict[torch.device, list[Buffer]] = {}

    def take(self, device: torch.device) -> Buffer:
        """A buffer that nobody else has; the one that was given back last, so that each keeps its size."""
        free = self._free.setdefault(device, [])
        return free.pop() if free else Buffer(device)

    def give_back(self, taken: list[Buffer], output: object = None) -> None:
        """Lets others take these buffers, except those that `output` still needs.

        Args:
            taken: in the order of taking.
            output: what was computed from them.
        """
        for buffer in reversed(taken):
            if output is None or not buffer.holds(output):
                self._free.setdefault(buffer.device, []).append(buffer)


def pieces(weight: Tensor, limit: int) -> Iterator[slice]:
    """The rows of a matrix, cut so that no piece has more than `limit` bytes, unless two rows have.

    Pieces are of one size, but for the last, and begin at even rows: noise comes in pairs of elements.
    """
    rows, row_bytes = len(weight), weight.shape[1] * weight.element_size()
    most = max(limit // row_bytes // 2 * 2, 2)
    size = -(-rows // -(-rows // most))
    size += size % 2
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def scratch_bytes(parameters: Iterable[Tensor]) -> int:
    """Memory that dense perturbations take: that of the largest parameter, or of a piece if it is a matrix.

    As long as ``F.linear`` and ``F.embedding`` alone read the matrices that exceed ``PIECE_BYTES``.
    """
    return max((min(p.nbytes, PIECE_BYTES) if p.ndim == 2 else p.nbytes for p in parameters), default=0)
