"""Where in a batch candidates and their tokens are."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class AnswerIndex:
    """The places of a batch's candidates and their tokens, as indices, so that selecting them waits for no device.

    The size of a selection by a mask would have to be read back from the device.

    Args:
        size: examples of the batch.
        rows: rows of the batch that hold a candidate, counted through all examples, (N,); None for all of them.
        tokens: answer tokens, (3, K): which of these N rows, which of the row's A places, and where in the flattened
            `answer_ids`. None if all candidates have A tokens.
        shape: C and A.
        ends: for each example, how many of the N rows and of the K tokens belong to it or to examples before it.
    """

    def __init__(
        self,
        size: int,
        rows: Tensor | None,
        tokens: Tensor | None,
        shape: tuple[int, int],
        ends: Sequence[tuple[int, int]],
    ) -> None:
        self.size = size
        self.rows = rows
        self.tokens = tokens
        self._shape = shape
        self._ends = ends

    @classmethod
    def of(cls, answer_ids: Tensor) -> "AnswerIndex":
        """The index of candidates of (B, C, A) tokens, -1 where they have none. Waits for the device they are on."""
        mask = answer_ids >= 0
        present = mask.any(dim=-1)
        rows = None if present.all() else present.flatten().nonzero()[:, 0]
        tokens = None if mask.all() else torch.cat([mask[present].nonzero().T, mask.flatten().nonzero().T])
        ends = zip(*(counts.flatten(1).sum(1).cumsum(0).tolist() for counts in (present, mask)), strict=True)
        return cls(len(answer_ids), rows, tokens, (mask.shape[1], mask.shape[2]), list(ends))

    @classmethod
    def of_batch(cls, batch: Mapping[str, Any]) -> "AnswerIndex":
        """The index that a batch holds, or a new one if that is for a different number of examples."""
        index, answer_ids = batch.get("answer_index"), batch["answer_ids"]
        return cls.of(answer_ids) if index is None or index.size != len(answer_ids) else index

    def part(self, start: int, stop: int) -> "AnswerIndex":
        """The index of the examples from `start` up to but not including `stop`; waits for no device."""
        stop = min(stop, self.size)
        before, last = self._ends[start - 1] if start else (0, 0), self._ends[stop - 1]
        rows = tokens = None
        candidates, length = self._shape
        if self.rows is not None:
            rows = self.rows[before[0] : last[0]] - start * candidates
        if self.tokens is not None:
            row, place, slot = self.tokens[:, before[1] : last[1]]
            tokens = torch.stack([row - before[0], place, slot - start * candidates * length])
        ends = [(row - before[0], token - before[1]) for row, token in self._ends[start:stop]]
        return AnswerIndex(stop - start, rows, tokens, self._shape, ends)

    def to(self, device: torch.device | str) -> "AnswerIndex":
        """Called by Lightning when it moves a batch to a device."""
        return self._with(lambda index: index.to(device, non_blocking=True))

    def pin_memory(self) -> "AnswerIndex":
        """Called by a ``DataLoader`` that pins memory."""
        return self._with(Tensor.pin_memory)

    def _with(self, moved: Callable[[Tensor], Tensor]) -> "AnswerIndex":
        rows, tokens = (None if index is None else moved(index) for index in (self.rows, self.tokens))
        return AnswerIndex(self.size, rows, tokens, self._shape, self._ends)
