"""Errors that all ways to turn text into tokens share."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def name_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The name of a tokenizer for messages: where it was loaded from, or else its class."""
    return tokenizer.name_or_path or type(tokenizer).__name__


def require_distinct(
    tokenizer: "PreTrainedTokenizerBase", answers: Sequence[str], answer_ids: Sequence[Sequence[int]]
) -> None:
    """Raises ValueError if an answer has no tokens, or two have the same."""
    if not all(answer_ids):
        raise ValueError(f"the tokenizer {name_of(tokenizer)} makes no token of one of the answers {list(answers)!r}")
    if len(set(map(tuple, answer_ids))) < len(answer_ids):
        raise ValueError(
            f"the tokenizer {name_of(tokenizer)} gives two of the answers {list(answers)!r} the same tokens"
        )


def too_few_tokens(max_length: int, what: str, needed: int) -> ValueError:
    """The error for a `max_length` that is too small for `what`, which needs at least `needed` tokens."""
    return ValueError(
        f"{max_length} tokens (`data.max_length` or the model's context length) do not hold {what}: at least {needed} "
        "are needed"
    )
