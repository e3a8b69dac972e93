"""Writes conversations with a tokenizer's chat template.

A ValueError says if the tokenizer has none, or one that refuses these turns.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from zolightning.data.encoding import name_of
from zolightning.data.language_modeling import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_prompt(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Message]) -> str:
    """The text after which the assistant's next turn begins."""
    return _written(tokenizer, turns, add_generation_prompt=True)


def chat_prompt_and_answer(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Message]) -> tuple[str, str]:
    """A conversation in two parts: everything up to the last turn, and that turn with the ending of the template.

    Raises:
        ValueError: also if the template writes earlier turns differently once there is an answer.
    """
    prompt = chat_prompt(tokenizer, turns[:-1])
    whole = _written(tokenizer, turns, add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise ValueError("the chat template writes the earlier turns differently if the last one is left out")
    return prompt, whole[len(prompt) :]


def end_of_turn(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Message]) -> str:
    """What the template writes after the words of the assistant's next turn: the token that ends a turn.

    Raises:
        ValueError: also if the template does not write these words as they stand.
    """
    said = "Yes"
    whole = _written(tokenizer, [*turns, Message(role="assistant", content=said)], add_generation_prompt=False)
    _, found, end = whole.rpartition(said)
    if not found:
        raise ValueError(f"the chat template does not write the assistant's turn as it stands, {said!r}")
    return end


def _written(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Message], add_generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer {name_of(tokenizer)} has no chat template: use a model that was trained to chat"
        )
    try:
        text = tokenizer.apply_chat_template(
            [{"role": turn["role"], "content": turn["content"]} for turn in turns],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # Jinja2's, and whatever a template raises
        raise ValueError(f"the chat template refuses this conversation: {error}") from None
    assert isinstance(text, str)
    return text
