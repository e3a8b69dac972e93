"""Tokens for a model with an encoder, which reads prompts, and a decoder, which writes answers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from zolightning.data.encoding import Example, refuse_marks, require_distinct, too_few_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_pair(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    answers: Sequence[str],
    *,
    label: int,
    id: int,
    max_length: int,
    room_for_answer: int = 0,
) -> Example:
    """Turns a prompt, at most `max_length` tokens of it, and its candidate answers into tokens.

    Prompt and answers are texts by themselves, without outer spaces, each with the tokens by which the tokenizer begins
    and ends one: so a model learns where an answer ends. A prompt that is too long loses its beginning, but none of
    these. It leaves no `room_for_answer`, which the decoder has of its own.

    Raises:
        ValueError: if the prompt is empty or has a mask or a separator, two candidates are the same, or an answer or a
            token of the prompt does not fit into `max_length`.
    """
    refuse_marks(prompt)
    prompt_ids = tokenizer(prompt, verbose=False)["input_ids"]
    words = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    answer_ids = tokenizer(text_target=[answer.strip() for answer in answers], verbose=False)["input_ids"]
    if not prompt_ids:
        raise ValueError("the prompt is empty")
    require_distinct(tokenizer, answers, answer_ids)

    room = max_length - (len(prompt_ids) - len(words))
    longest = max(map(len, answer_ids))
    if room < 1 or longest > max_length:
        what = f"a token of the prompt, or one of the answers {list(answers)!r}"
        raise too_few_tokens(max_length, what, needed=max(longest, max_length - room + 1))
    start = next(at for at in range(len(prompt_ids)) if prompt_ids[at : at + len(words)] == words)
    return Example(
        id=id,
        prompt_ids=prompt_ids[:start] + words[-room:] + prompt_ids[start + len(words) :],
        answer_ids=answer_ids,
        label=label,
        text=prompt if label < 0 else f"{prompt}[[{answers[label]}]]",
        truncated=len(words) > room,
        has_decoder=True,
    )
