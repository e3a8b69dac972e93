"""Prompts for networks that read both ways: a mask where the answer stands, and separators between texts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from zolightning.data.encoding import Example, name_of, too_few_tokens
from zolightning.data.templates import MASK, SEPARATOR

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_masked(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    answers: Sequence[str],
    *,
    label: int,
    id: int,
    max_length: int,
    room_for_answer: int = 0,
) -> Example:
    """Turns a prompt with a mask into at most `max_length` tokens, and each of its candidate answers into one.

    A separator becomes the tokenizer's separating token. A prompt that is too long loses its beginning, up to the mask
    at most, and then its end, but nothing that the tokenizer puts around a text. `room_for_answer` is ignored, as no
    answer is generated.

    Raises:
        ValueError: if the prompt has not exactly one mask, an answer is not one token that the tokenizer knows, or two
            answers are the same.
    """
    mask, mask_id, separator = tokenizer.mask_token, tokenizer.mask_token_id, tokenizer.sep_token
    if prompt.count(MASK) != 1:
        raise ValueError(
            f"a masked language model needs exactly one `{{{{ mask }}}}` in the prompt, got {prompt.count(MASK)} (see "
            "the tasks in configs/tasks/masked)"
        )
    if mask is None or separator is None or not isinstance(mask_id, int):
        raise ValueError(f"the tokenizer {name_of(tokenizer)} has no mask token, or no separator token")
    text = prompt.replace(MASK, mask).replace(SEPARATOR, separator)
    ids, body = (tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"] for special in (True, False))
    if body.count(mask_id) != 1:
        raise ValueError(f"the text itself contains the mask token of the tokenizer {name_of(tokenizer)}, {mask}")

    around = len(ids) - len(body)
    start = next(start for start in range(around + 1) if ids[start : start + len(body)] == body)
    room = max_length - around
    if room < 1:
        raise too_few_tokens(max_length, "a mask", needed=around + 1)
    return Example(
        id=id,
        prompt_ids=[*ids[:start], *_cut(body, room, mask_id), *ids[start + len(body) :]],
        answer_ids=[[token] for token in _tokens(tokenizer, answers)],
        label=label,
        text=text if label < 0 else text.replace(mask, f"[[{answers[label]}]]"),
        truncated=len(body) > room,
    )


def encode_for_classifier(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, num_classes: int, *, label: int, id: int, max_length: int
) -> Example:
    """Turns a text, or two with a separator between them, into at most `max_length` tokens as the tokenizer does.

    The longer one loses its end. The answers are the numbers of the classes.

    Raises:
        ValueError: if there are more than two texts, or a mask; or there is no token of a text, or no room for one.
    """
    texts = prompt.split(SEPARATOR)
    if len(texts) > 2 or MASK in prompt:
        raise ValueError("a classifier reads a text, or two with `{{ sep }}` between them, and no `{{ mask }}`")
    around = tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
    if max_length <= around:  # tokenizers would cut nothing, or everything
        raise too_few_tokens(max_length, "a token of the text", needed=around + 1)
    ids = tokenizer(*texts, verbose=False)["input_ids"]
    kept = tokenizer(*texts, truncation=True, max_length=max_length)["input_ids"]
    if not kept:
        raise ValueError("the text is empty")
    return Example(
        id=id,
        prompt_ids=kept,
        answer_ids=[[number] for number in range(num_classes)],
        label=label,
        text=" | ".join(texts) if label < 0 else f"{' | '.join(texts)} [[{label}]]",
        truncated=len(kept) < len(ids),
    )


def _cut(body: list[int], room: int, mask: int) -> list[int]:
    """At most `room` of the tokens, the mask among them."""
    start = min(body.index(mask), max(0, len(body) - room))
    return body[start : start + room]


def _tokens(tokenizer: "PreTrainedTokenizerBase", answers: Sequence[str]) -> list[int]:
    name = name_of(tokenizer)
    tokens = []
    for answer in answers:
        ids = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            found = ", ".join(tokenizer.convert_ids_to_tokens(ids)) or "none"
            raise ValueError(
                f"a mask stands for one token, but the answer {answer!r} is not one token of the tokenizer {name}: "
                f"it gives {found}"
            )
        tokens += ids
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"the tokenizer {name} gives two of the answers {list(answers)!r} the same token")
    return tokens
