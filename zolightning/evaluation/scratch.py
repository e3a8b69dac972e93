"""Memory that perturbed weights lie in while they are read, the same for one layer after another."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from zolightning.evaluation.buffer import Buffer
from zolightning.evaluation.together import Together

# A larger matrix is perturbed and multiplied in pieces of rows: an output layer has as many as the vocabulary.
PIECE_BYTES = 64 * 2**20


class Scratch:
    """Buffers to take, one for each perturbed weight that a function reads, and to give back after it."""

    def __init__(self) -> None:
        self._free: dict[torch.device, list[Buffer]] = {}
        self._together: dict[torch.device, Together] = {}

    def together(self, device: torch.device) -> Together:
        """What the small tensors of an evaluation lie in."""
        return self._together.setdefault(device, Together(device))

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
