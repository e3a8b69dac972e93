"""From tokens to tensors: the batch that several examples become."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from zolightning.data.encoding import Example
from zolightning.data.task import Objective


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
    def of_batch(cls, batch: "Batch") -> "AnswerIndex":
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


class Batch(TypedDict):
    """B examples with at most C candidates of at most A tokens. A slice of every tensor, and a part of the index, is a
    smaller batch.

    If A is 1, a row of `input_ids` is a prompt, R is 1, and the logits at its end score all candidates.
    Otherwise R is C and row c is the prompt followed by candidate c, so the row's last tokens are the answer.
    Where an example has fewer than C candidates, the others have no answer tokens and their rows hold the
    prompt alone.

    For a model with a decoder, which reads the answers, R is 1 whatever A is, and all padding is on the right.
    """

    objective: Objective
    answer_index: NotRequired[AnswerIndex]
    input_ids: Tensor  # (B, R, T), padded on the left, or for bidirectional networks as their tokenizer does
    attention_mask: Tensor  # (B, R, T), 0 on padding
    answer_ids: Tensor  # (B, C, A), padded with -1, on the left unless there is a decoder
    label: Tensor  # (B,), index of the right candidate; of a regression the right number, as the bits of a float32
    id: Tensor  # (B,), where the example stands in its source
    right: NotRequired[Tensor]  # (B, C), all candidates that are right, where that can be several
    prompt_ids: NotRequired[Tensor]  # (B, P), padded as `input_ids`: what a text is generated from
    prompt_mask: NotRequired[Tensor]  # (B, P), 0 on padding
    references: NotRequired[np.ndarray]  # (B,), of each example a tuple of what the generated text is compared with
    content_free: NotRequired["Batch"]  # U examples with prompts without content, after which candidates are scored too
    content_free_place: NotRequired[Tensor]  # (B,), which of these U belongs to each example


def collate(
    examples: Sequence[Example],
    pad_id: int,
    objective: Objective,
    gold_only: bool = False,
    multiple: int = 1,
    with_prompts: bool = False,
    padding_side: Literal["left", "right"] = "left",
) -> Batch:
    """Stacks examples, one at least, into a batch.

    Short rows are padded with `pad_id`, which is masked out, to a length that is a multiple of `multiple`. `gold_only`
    leaves out the wrong candidates; `with_prompts` adds the prompts that texts are generated from, and the references
    that they are compared with.
    """
    labels = [0 if gold_only else example.label for example in examples]
    candidates = [[example.answer_ids[example.label]] if gold_only else example.answer_ids for example in examples]
    num_candidates = max(map(len, candidates))
    # an absent candidate has no tokens
    padded = [answers + [[]] * (num_candidates - len(answers)) for answers in candidates]
    has_decoder = examples[0].has_decoder
    if has_decoder or all(len(answer) == 1 for answers in candidates for answer in answers):
        rows = [[example.prompt_ids] for example in examples]
    else:
        rows = [
            [example.prompt_ids + answer for answer in answers]
            for example, answers in zip(examples, padded, strict=True)
        ]
    input_ids, attention_mask = _with_mask(rows, pad_id, multiple, padding_side)
    answer_ids = _stack(padded, -1, side="right" if has_decoder else "left")
    batch = Batch(
        # first, because Lightning infers the batch size from the entries that follow what has no size
        objective=objective,
        answer_index=AnswerIndex.of(answer_ids),
        input_ids=input_ids,
        attention_mask=attention_mask,
        answer_ids=answer_ids,
        label=torch.tensor(labels),
        id=torch.tensor([example.id for example in examples]),
    )
    if objective == "regression":
        numbers = torch.tensor([math.nan if example.target is None else example.target for example in examples])
        batch["label"] = numbers.view(torch.int32)  # under bf16-true Lightning would round floating-point tensors
    if any(len(example.right) > 1 for example in examples) and not gold_only:
        batch["right"] = torch.tensor(
            [[index in example.right for index in range(num_candidates)] for example in examples]
        )
    free = [example.content_free for example in examples if example.content_free is not None]
    if free:
        distinct = {_tokens(one): one for one in free}
        places = {tokens: place for place, tokens in enumerate(distinct)}
        batch["content_free"] = collate(list(distinct.values()), pad_id, objective, padding_side=padding_side)
        batch["content_free_place"] = torch.tensor([places[_tokens(one)] for one in free])
    if with_prompts:
        prompt_ids, prompt_mask = _with_mask([[example.prompt_ids] for example in examples], pad_id, 1, padding_side)
        batch["prompt_ids"], batch["prompt_mask"] = prompt_ids[:, 0], prompt_mask[:, 0]
        batch["references"] = np.empty(len(examples), dtype=object)  # so that it can be sliced like a tensor
        batch["references"][:] = [example.references for example in examples]
    return batch


def _tokens(example: Example) -> tuple[tuple[int, ...], ...]:
    """All tokens of an example, as a key that is the same for equal examples only."""
    return (tuple(example.prompt_ids), *map(tuple, example.answer_ids))


def _with_mask(groups: Sequence[Sequence[list[int]]], pad_id: int, multiple: int, side: str) -> tuple[Tensor, Tensor]:
    """Rows of tokens as a tensor, and a mask of the same shape that is 0 on padding."""
    ones = [[[1] * len(row) for row in group] for group in groups]
    return _stack(groups, pad_id, multiple, side), _stack(ones, 0, multiple, side)


def _stack(groups: Iterable[Sequence[list[int]]], fill: int, multiple: int = 1, side: str = "left") -> Tensor:
    """Stacks groups of equally many rows into a tensor of three dimensions; rows are padded on one side."""
    groups = list(groups)
    width = max(len(row) for group in groups for row in group)
    width += -width % multiple

    def filled(row: list[int]) -> list[int]:
        missing = [fill] * (width - len(row))
        return missing + row if side == "left" else row + missing

    return torch.tensor([[filled(row) for row in group] for group in groups])
