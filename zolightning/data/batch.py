"""From tokens to tensors: the batch that several examples become."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from zolightning.data.answer_index import AnswerIndex
from zolightning.data.encoding import Example
from zolightning.data.task import Objective


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
    candidates = [[example.answer_ids[example.label]] if gold_only else example.answer_ids for example in examples]
    num_candidates = max(map(len, candidates))
    # an absent candidate has no tokens
    padded = [answers + [[]] * (num_candidates - len(answers)) for answers in candidates]
    prompts = [[example.prompt_ids] for example in examples]
    has_decoder = examples[0].has_decoder
    if has_decoder or all(len(answer) == 1 for answers in candidates for answer in answers):
        rows = prompts
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
        label=torch.tensor([0 if gold_only else example.label for example in examples]),
        id=torch.tensor([example.id for example in examples]),
    )
    if objective == "regression":
        numbers = torch.tensor([math.nan if example.target is None else example.target for example in examples])
        batch["label"] = numbers.view(torch.int32)  # under bf16-true Lightning would round floating-point tensors
    if any(len(example.right) > 1 for example in examples) and not gold_only:
        batch["right"] = torch.tensor(
            [[index in example.right for index in range(num_candidates)] for example in examples]
        )
    if free := [example.content_free for example in examples if example.content_free is not None]:
        distinct = {_tokens(one): one for one in free}
        places = {tokens: place for place, tokens in enumerate(distinct)}
        batch["content_free"] = collate(list(distinct.values()), pad_id, objective, padding_side=padding_side)
        batch["content_free_place"] = torch.tensor([places[_tokens(one)] for one in free])
    if with_prompts:
        prompt_ids, prompt_mask = _with_mask(prompts, pad_id, 1, padding_side)
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
