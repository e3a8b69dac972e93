"""Turns rows, which are text, into examples, which are tokens."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from zolightning.data.chat import chat_prompt, chat_prompt_and_answer, end_of_turn
from zolightning.data.encoding import Example, encode, encode_whole_text, ended
from zolightning.data.generation import Generation
from zolightning.data.language_modeling import Completion, Conversation, Message, PlainText
from zolightning.data.regression import Regression
from zolightning.data.row import Row
from zolightning.data.source import NO_LABEL
from zolightning.data.task import Task
from zolightning.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Calibration = Literal["zero_shot", "in_context"]


def example_of(
    task: Task,
    row: Row,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    chat: bool,
    encode: Callable[..., Example] = encode,
    calibration: Calibration | None = None,
) -> Example:
    """Turns a row and its demonstrations into tokens, at most `max_length` of them.

    Where not all demonstrations fit, as few of them as possible are left out, from the first one on. In a `chat` a
    prompt is a user's turn in the tokenizer's chat template. For a `calibration` the row is encoded without its content
    as well: after its demonstrations (`in_context`) or without them (`zero_shot`).

    Raises:
        ValueError: if a part of the row gives no tokens, the tokenizer has no chat template, or the row does not fit.
    """
    encoded = partial(_example, task, tokenizer=tokenizer, max_length=max_length, chat=chat, encode=encode)
    example = encoded(row)
    if example.truncated and row.shown:
        counts = range(len(row.shown))
        num_left_out = bisect_left(counts, True, key=lambda count: not encoded(row.without_first(count)).truncated)
        row = row.without_first(num_left_out)
        example = replace(encoded(row), num_left_out=num_left_out)
    if calibration is None:
        return example
    assert row.content_free is not None, "the data module checks that there is one"
    prompt, answers = row.content_free
    shown = row.shown if calibration == "in_context" else ()
    if not (prompt or shown or chat):
        prompt = _beginning(tokenizer)
    free = replace(row, prompt=prompt, answers=answers, turns=[Message(role="user", content=prompt)]).after(shown)
    if not (prompt or chat) and shown:  # line breaks at the end of a text often differ as tokens from those within it
        kept = free.prompt.rstrip("\n")
        free = replace(free, prompt=kept, answers=[free.prompt[len(kept) :] + answer for answer in answers])
    return replace(example, content_free=encoded(free))


def warn_of_cuts(examples: Sequence[Example], split: str, limit: str, num_demonstrations: int) -> None:
    """Warns of a split in which prompts were cut, or demonstrations left out, to fit into a limit; says how many."""
    if num_cut := sum(example.truncated for example in examples):
        rank_zero_warn(f"{num_cut} of {len(examples)} prompts of the {split} split were cut to {limit}.")
    if left_out := [example.num_left_out for example in examples if example.num_left_out]:
        rank_zero_warn(
            f"{len(left_out)} of {len(examples)} prompts of the {split} split show fewer than {num_demonstrations} "
            f"demonstrations, {num_demonstrations - max(left_out)} at least: the first ones are left out, so that "
            f"{limit} hold them."
        )


def _example(
    task: Task,
    row: Row,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    chat: bool,
    encode: Callable[..., Example],
) -> Example:
    """A row with all of its demonstrations, cut on the left where that is too long."""
    if isinstance(task, Regression):
        raise ValueError("`target` is a number, which needs SequenceClassifier: this model has no head to predict it")
    if isinstance(task, PlainText):
        return encode_whole_text(tokenizer, row.answers[0], id=row.id, max_length=max_length)
    prompt, answers = row.prompt, row.answers
    if isinstance(task, Conversation):
        prompt, answer = chat_prompt_and_answer(tokenizer, row.turns)
        answers = [answer]
    elif chat:
        prompt, answers = chat_prompt(tokenizer, row.turns), [answer.lstrip(" ") for answer in answers]
        if isinstance(task, Completion | Generation):
            end = end_of_turn(tokenizer, row.turns)
            answers = [answer.strip() + end for answer in answers]
    elif isinstance(task, Completion):
        answers = [ended(tokenizer, answer) for answer in answers]
    return encode(
        tokenizer,
        prompt,
        answers,
        label=row.right[0] if row.right else NO_LABEL,
        id=row.id,
        max_length=max_length,
        room_for_answer=task.max_new_tokens if isinstance(task, Generation) else 0,
    )


def _beginning(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A prompt for answers without a prompt: the token with which the tokenizer begins a text, or could begin one."""
    if tokenizer("")["input_ids"]:
        return ""
    token = tokenizer.bos_token or tokenizer.eos_token
    if token is None:
        raise ValueError(
            "the content-free prompt is empty, and the tokenizer has no token that a text begins with: write "
            "`content_free_prompt`"
        )
    return token
