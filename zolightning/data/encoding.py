"""From text to tensors: one row to token ids, several rows to a batch."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from zolightning.data.task import Objective
from zolightning.data.templates import MASK, SEPARATOR

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """A row in tokens.

    Args:
        id: Where the row stands in its source, counted from 0.
        prompt_ids: The prompt, with the tokens that the tokenizer starts a text with.
        answer_ids: The candidates.
        label: Index of the right candidate; -1 if it is not known.
        text: The prompt, and the right answer in double brackets.
        truncated: Whether the prompt lost its beginning.
        right: Indices of all candidates that are right.
        references: What a generated answer is compared with.
        has_decoder: Whether answers are read by a decoder and the prompt by an encoder, not one after the other.
        num_left_out: How many demonstrations do not fit.
        content_free: The same candidates after the prompt without its content, where scores are calibrated by it.
        target: The right number of a regression, if it is known.
    """

    id: int
    prompt_ids: list[int]
    answer_ids: list[list[int]]
    label: int
    text: str
    truncated: bool = False
    right: tuple[int, ...] = ()
    references: tuple[str, ...] = ()
    has_decoder: bool = False
    num_left_out: int = 0
    content_free: "Example | None" = None
    target: float | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt with its longest candidate."""
        return len(self.prompt_ids) + max(map(len, self.answer_ids))


class AnswerIndex:
    """The places of a batch's candidates and their tokens, as indices, so that selecting them waits for no device.

    The size of a selection by a mask would have to be read back from the device.

    Args:
        size: Examples of the batch.
        rows: Rows of the batch that hold a candidate, counted through all examples, (N,); None for all of them.
        tokens: Answer tokens, (3, K): which of these N rows, which of the row's A places, and where in the flattened
            `answer_ids`. None if all candidates have A tokens.
    """

    def __init__(self, size: int, rows: Tensor | None, tokens: Tensor | None) -> None:
        self.size = size
        self.rows = rows
        self.tokens = tokens

    @classmethod
    def of(cls, answer_ids: Tensor) -> "AnswerIndex":
        """The index of candidates of (B, C, A) tokens, -1 where they have none. Waits for the device they are on."""
        mask = answer_ids >= 0
        present = mask.any(dim=-1)
        rows = None if present.all() else present.flatten().nonzero()[:, 0]
        tokens = None if mask.all() else torch.cat([mask[present].nonzero().T, mask.flatten().nonzero().T])
        return cls(len(answer_ids), rows, tokens)

    @classmethod
    def of_batch(cls, batch: "Batch") -> "AnswerIndex":
        """The index that a batch brings; of a part of a batch, whose index is that of the whole, its own."""
        index, answer_ids = batch.get("answer_index"), batch["answer_ids"]
        return cls.of(answer_ids) if index is None or index.size != len(answer_ids) else index

    def to(self, device: torch.device | str) -> "AnswerIndex":
        """As Lightning calls it for what it moves to the device."""
        rows, tokens = (None if x is None else x.to(device, non_blocking=True) for x in (self.rows, self.tokens))
        return AnswerIndex(self.size, rows, tokens)

    def pin_memory(self) -> "AnswerIndex":
        """As a ``DataLoader`` calls it."""
        rows, tokens = (None if x is None else x.pin_memory() for x in (self.rows, self.tokens))
        return AnswerIndex(self.size, rows, tokens)


class Batch(TypedDict):
    """B examples with at most C candidates of at most A tokens. A slice of every tensor is a smaller batch.

    If A is 1, a row of `input_ids` is a prompt, R is 1, and the logits at its end score all candidates.
    Otherwise R is C and row c is the prompt followed by candidate c, so the row's last tokens are the answer.
    Where an example has fewer than C candidates, the others have no answer tokens and their rows hold the
    prompt alone. The index is that of the whole batch, also in a slice.

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
    content_free: NotRequired["Batch"]  # U examples: those after whose prompts without content candidates are scored
    content_free_place: NotRequired[Tensor]  # (B,), which of these U belongs to each example


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    answers: Sequence[str],
    *,
    label: int,
    id: int,
    max_length: int,
    room_for_answer: int = 0,
) -> Example:
    """Turns a prompt and its candidate answers into tokens, at most `max_length` together.

    An answer's tokens are those by which the text of prompt and answer is longer than the prompt. Where the
    tokenizer merges across the boundary that is not defined, and the answer is tokenized by itself. A prompt
    that is too long loses its beginning, but not the token that the tokenizer starts a text with. Nothing is
    appended. The prompt leaves room for at least `room_for_answer` tokens.

    Raises:
        ValueError: A part has no tokens, two candidates are the same, the answers leave no room for the prompt, or it
            has a mask or a separator.
    """
    if MASK in prompt or SEPARATOR in prompt:
        raise ValueError("`{{ mask }}` and `{{ sep }}` in a prompt are for MaskedLM and SequenceClassifier")
    name = tokenizer.name_or_path or type(tokenizer).__name__
    texts = [answers[0], prompt, *(prompt + answer for answer in answers)]
    first_ids, prompt_ids, *full_ids = tokenizer(texts, verbose=False)["input_ids"]
    alone_ids = tokenizer(list(answers), add_special_tokens=False, verbose=False)["input_ids"]
    num_leading = len(first_ids) - len(alone_ids[0])
    if first_ids[num_leading:] != alone_ids[0]:
        raise ValueError(f"the tokenizer {name} ends a text with a special token, so no answer can follow a prompt")
    if not prompt_ids:
        raise ValueError("the prompt is empty")

    start = len(prompt_ids)
    answer_ids = [
        full[start:] if full[:start] == prompt_ids else alone for full, alone in zip(full_ids, alone_ids, strict=True)
    ]
    if not all(answer_ids):
        raise ValueError(f"the tokenizer {name} makes no token of one of the answers {list(answers)!r}")
    if len(set(map(tuple, answer_ids))) < len(answer_ids):
        raise ValueError(f"the tokenizer {name} gives two of the answers {list(answers)!r} the same tokens")

    # A prompt whose text begins with what the tokenizer begins with anyway, as chat templates do, has it twice.
    if num_leading and prompt_ids[num_leading : 2 * num_leading] == prompt_ids[:num_leading]:
        prompt_ids = prompt_ids[num_leading:]

    longest = max(room_for_answer, *map(len, answer_ids))
    room = max_length - longest - num_leading
    if room < 1:
        raise ValueError(
            f"{max_length} tokens (`data.max_length` or the model's context length) do not hold a token of the "
            f"prompt and the answers {list(answers)!r}: at least {longest + num_leading + 1} are needed"
        )
    return Example(
        id=id,
        prompt_ids=prompt_ids[:num_leading] + prompt_ids[num_leading:][-room:],
        answer_ids=answer_ids,
        label=label,
        text=prompt if label < 0 else f"{prompt}[[{answers[label]}]]",
        truncated=len(prompt_ids) - num_leading > room,
    )


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str, *, id: int, max_length: int) -> Example:
    """Turns a whole text into tokens, all but the first of which are the answer. A long one loses its end.

    Raises:
        ValueError: The text is less than two tokens, or `max_length` is.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < 2 or max_length < 2:
        raise ValueError(f"a text needs two tokens or more, got {min(len(ids), max_length)}")
    kept = ids[:max_length]
    return Example(
        id=id, prompt_ids=kept[:1], answer_ids=[kept[1:]], label=0, text=text, truncated=len(ids) > max_length
    )


def check_tokens(example: Example, num_embeddings: int, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises ValueError if an example has a token that is in the tokenizer, but not in the model."""
    largest = max(max(ids) for ids in (example.prompt_ids, *example.answer_ids))
    if largest >= num_embeddings:
        raise ValueError(
            f"the token {tokenizer.convert_ids_to_tokens(largest)!r} has the number {largest}, but the model has "
            f"embeddings for {num_embeddings} only: resize them (`model.resize_token_embeddings`) and save the model"
        )


def collate(
    examples: Sequence[Example],
    pad_id: int,
    objective: Objective,
    gold_only: bool = False,
    multiple: int = 1,
    with_prompts: bool = False,
    padding_side: Literal["left", "right"] = "left",
) -> Batch:
    """Stacks examples into a batch.

    Args:
        examples: At least one.
        pad_id: Token beside short rows. It is masked out; any valid token will do.
        objective: Passed on.
        gold_only: Whether to leave out the wrong candidates.
        multiple: What the length of a row is a multiple of.
        with_prompts: Whether to add what texts are generated from, and compared with.
        padding_side: The side on which prompts are padded.
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
    masks = [[[1] * len(row) for row in group] for group in rows]
    answer_ids = _stack(padded, -1, side="right" if has_decoder else "left")
    batch = Batch(
        # first, because Lightning infers the batch size from the entries that follow what has no size
        objective=objective,
        answer_index=AnswerIndex.of(answer_ids),
        input_ids=_stack(rows, pad_id, multiple, padding_side),
        attention_mask=_stack(masks, 0, multiple, padding_side),
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
        distinct = {(tuple(one.prompt_ids), *map(tuple, one.answer_ids)): one for one in free}
        places = {key: place for place, key in enumerate(distinct)}
        keys = [(tuple(one.prompt_ids), *map(tuple, one.answer_ids)) for one in free]
        batch["content_free"] = collate(list(distinct.values()), pad_id, objective, padding_side=padding_side)
        batch["content_free_place"] = torch.tensor([places[key] for key in keys])
    if with_prompts:
        prompts = [[example.prompt_ids] for example in examples]
        prompt_masks = [[[1] * len(row) for row in group] for group in prompts]
        batch["prompt_ids"] = _stack(prompts, pad_id, side=padding_side)[:, 0]
        batch["prompt_mask"] = _stack(prompt_masks, 0, side=padding_side)[:, 0]
        batch["references"] = np.empty(len(examples), dtype=object)  # so that it is cut as a tensor is
        batch["references"][:] = [example.references for example in examples]
    return batch


def _stack(groups: Iterable[Sequence[list[int]]], fill: int, multiple: int = 1, side: str = "left") -> Tensor:
    """Stacks lists of equally many lists into a tensor of three dimensions, filled up on one side."""
    groups = list(groups)
    width = max(len(row) for group in groups for row in group)
    width += -width % multiple

    def filled(row: list[int]) -> list[int]:
        missing = [fill] * (width - len(row))
        return missing + row if side == "left" else row + missing

    return torch.tensor([[filled(row) for row in group] for group in groups])
