"""From text to tokens: the example that a row becomes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zolightning.data.templates import MASK, SEPARATOR

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """A row in tokens."""

    id: int  # where the row stands in its source, counted from 0
    prompt_ids: list[int]  # with the tokens that the tokenizer starts a text with
    answer_ids: list[list[int]]  # of the candidates
    label: int  # index of the right candidate; -1 if it is not known
    text: str  # the prompt, and the right answer in double brackets
    truncated: bool = False  # whether the prompt lost its beginning
    right: tuple[int, ...] = ()  # indices of all candidates that are right
    references: tuple[str, ...] = ()  # what a generated answer is compared with
    has_decoder: bool = False  # whether an encoder reads the prompt and a decoder the answers, not both as one sequence
    num_left_out: int = 0  # how many demonstrations do not fit
    content_free: "Example | None" = None  # the candidates after the prompt without its content, for calibration
    target: float | None = None  # the right number of a regression, if it is known

    @property
    def length(self) -> int:
        """Tokens of the prompt with its longest candidate."""
        return len(self.prompt_ids) + max(map(len, self.answer_ids))


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

    An answer's tokens are those that follow the prompt's tokens when both are tokenized as one text. Where the
    tokenizer merges characters across the boundary there are none, and the answer is tokenized by itself. A prompt
    that is too long loses its beginning, but not the token that the tokenizer starts a text with. Nothing is
    appended. The prompt leaves room for at least `room_for_answer` tokens.

    Raises:
        ValueError: if a part has no tokens, two candidates are the same, the answers leave no room for the prompt, or
            the prompt has a mask or a separator.
    """
    refuse_marks(prompt)
    texts = [answers[0], prompt, *(prompt + answer for answer in answers)]
    first_ids, prompt_ids, *full_ids = tokenizer(texts, verbose=False)["input_ids"]
    alone_ids = tokenizer(list(answers), add_special_tokens=False, verbose=False)["input_ids"]
    num_leading = len(first_ids) - len(alone_ids[0])
    if first_ids[num_leading:] != alone_ids[0]:
        raise ValueError(
            f"the tokenizer {name_of(tokenizer)} ends a text with a special token, so no answer can follow a prompt"
        )
    if not prompt_ids:
        raise ValueError("the prompt is empty")

    start = len(prompt_ids)
    answer_ids = [
        full[start:] if full[:start] == prompt_ids else alone for full, alone in zip(full_ids, alone_ids, strict=True)
    ]
    require_distinct(tokenizer, answers, answer_ids)

    # Chat templates write the first token themselves; the tokenizer has then added it a second time.
    if num_leading and prompt_ids[num_leading : 2 * num_leading] == prompt_ids[:num_leading]:
        prompt_ids = prompt_ids[num_leading:]

    longest = max(room_for_answer, *map(len, answer_ids))
    room = max_length - longest - num_leading
    if room < 1:
        what = f"a token of the prompt and the answers {list(answers)!r}"
        raise too_few_tokens(max_length, what, needed=longest + num_leading + 1)
    return Example(
        id=id,
        prompt_ids=prompt_ids[:num_leading] + prompt_ids[num_leading:][-room:],
        answer_ids=answer_ids,
        label=label,
        text=prompt if label < 0 else f"{prompt}[[{answers[label]}]]",
        truncated=len(prompt_ids) - num_leading > room,
    )


def encode_whole_text(tokenizer: "PreTrainedTokenizerBase", text: str, *, id: int, max_length: int) -> Example:
    """Turns a whole text into tokens, all but the first of which are the answer. A long one loses its end.

    Raises:
        ValueError: if the text has fewer than two tokens, or `max_length` is below 2.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < 2 or max_length < 2:
        raise ValueError(f"a text needs two tokens or more, got {min(len(ids), max_length)}")
    kept = ids[:max_length]
    return Example(
        id=id, prompt_ids=kept[:1], answer_ids=[kept[1:]], label=0, text=text, truncated=len(ids) > max_length
    )


def ended(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    """A text with the tokenizer's end-of-text token, if there is one that neither text nor tokenizer writes anyway."""
    end, last = tokenizer.eos_token, [tokenizer.eos_token_id]
    if end is None or text.endswith(end) or tokenizer(text, verbose=False)["input_ids"][-1:] == last:
        return text
    return text + end


def check_tokens(example: Example, num_embeddings: int, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises ValueError if an example has a token that is in the tokenizer, but not in the model."""
    largest = max(max(ids) for ids in (example.prompt_ids, *example.answer_ids))
    if largest >= num_embeddings:
        raise ValueError(
            f"the token {tokenizer.convert_ids_to_tokens(largest)!r} has the id {largest}, but the model has "
            f"embeddings for {num_embeddings} only: resize them (`model.resize_token_embeddings`) and save the model"
        )


def name_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The name of a tokenizer for messages: where it was loaded from, or else its class."""
    return tokenizer.name_or_path or type(tokenizer).__name__


def refuse_marks(prompt: str) -> None:
    """Raises ValueError if a prompt has a mask or a separator."""
    if MASK in prompt or SEPARATOR in prompt:
        raise ValueError("`{{ mask }}` and `{{ sep }}` in a prompt are for MaskedLM and SequenceClassifier")


def require_distinct(
    tokenizer: "PreTrainedTokenizerBase", answers: Sequence[str], answer_ids: Sequence[Sequence[int]]
) -> None:
    """Raises ValueError if an answer has no tokens, or two answers have the same tokens."""
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
