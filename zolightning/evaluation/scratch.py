"""Scratch memory for perturbed weights while they are read; one layer after another reuses it."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from zolightning.evaluation.buffer import Buffer
from zolightning.evaluation.small_tensors import SmallTensors

# A larger matrix is perturbed and multiplied in pieces of rows: an output layer has as many as the vocabulary.
PIECE_BYTES = 64 * 2**20


class Scratch:
    """A pool of buffers: a function takes one for each perturbed weight it reads, and gives it back afterwards."""

    def __init__(self) -> None:
        self._free: dict[torch.device, list[Buffer]] = {}
        self._small_tensors: dict[torch.device, SmallTensors] = {}

    def small_tensors(self, device: torch.device) -> SmallTensors:
        """The memory of the small tensors of an evaluation, which are perturbed together."""
        return self._small_tensors.setdefault(device, SmallTensors(device))

    def take(self, device: torch.device) -> Buffer:
        """A free buffer: the one given back last, so that each keeps about its size."""
        free = self._free.setdefault(device, [])
        return free.pop() if free else Buffer(device)

    def give_back(self, taken: list[Buffer], output: object = None) -> None:
        """Lets others take these buffers, except those that `output` still needs.

        Args:
            taken: the buffers, in the order in which they were taken.
            output: the result computed from them.
        """
        for buffer in reversed(taken):
            if output is None or not buffer.holds(output):
                self._free.setdefault(buffer.device, []).append(buffer)


def pieces(weight: Tensor, limit: int) -> Iterator[slice]:
    """Cuts the rows of a matrix into pieces of at most `limit` bytes, or of two rows if these are larger.

    All pieces but the last have the same size. They begin at even rows, because noise comes in pairs of elements.
    """
    rows, row_bytes = len(weight), weight.shape[1] * weight.element_size()
    most = max(limit // row_bytes // 2 * 2, 2)
    size = -(-rows // -(-rows // most))
    size += size % 2
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def scratch_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of scratch memory for dense perturbations: the size of the largest parameter, at most a piece for a matrix.

    This holds if only ``F.linear`` and ``F.embedding`` read the matrices that are larger than ``PIECE_BYTES``.
    """
    return max((min(p.nbytes, PIECE_BYTES) if p.ndim == 2 else p.nbytes for p in parameters), default=0)
