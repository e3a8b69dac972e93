"""From rows in words to examples in tokens, as each kind of task has it."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from zolightning.data.chat import chat_prompt, chat_prompt_and_answer
from zolightning.data.conversation import Conversation
from zolightning.data.encoding import Example, encode, encode_text
from zolightning.data.generation import Generation
from zolightning.data.plain_text import PlainText
from zolightning.data.rows import Row
from zolightning.data.source import NO_LABEL
from zolightning.data.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def example_of(
    task: Task,
    row: Row,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    chat: bool,
    encode: Callable[..., Example] = encode,
) -> Example:
    """Turns a row into tokens, at most `max_length` of them.

    Args:
        task: The row's task.
        row: The row in words.
        tokenizer: The model's.
        max_length: Tokens of prompt and answer together.
        chat: Whether a prompt is a user's turn in the tokenizer's chat template.
        encode: Makes tokens of a prompt and its answers.

    Raises:
        ValueError: The tokenizer makes nothing of a part of it, or has no chat template, or it does not fit.
    """
    if isinstance(task, PlainText):
        return encode_text(tokenizer, row.answers[0], id=row.id, max_length=max_length)
    prompt, answers = row.prompt, row.answers
    if isinstance(task, Conversation):
        prompt, answer = chat_prompt_and_answer(tokenizer, row.turns)
        answers = [answer]
    elif chat:
        prompt, answers = chat_prompt(tokenizer, row.turns), [answer.lstrip(" ") for answer in answers]
    return encode(
        tokenizer,
        prompt,
        answers,
        label=row.right[0] if row.right else NO_LABEL,
        id=row.id,
        max_length=max_length,
        room_for_answer=task.max_new_tokens if isinstance(task, Generation) else 0,
    )
