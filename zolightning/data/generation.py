"""Generation: the answer is a text that the model writes, compared with the row's references."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from zolightning.checks import require_integer
from zolightning.data.task import PromptTask
from zolightning.data.templates import check_template, fill, template_fields


@dataclass(frozen=True, kw_only=True)
class Generation(PromptTask):
    """A prompt that the model continues; validation compares what it writes with the references.

    The first reference is trained by its likelihood, as MeZO trains SQuAD and DROP. Evaluation writes the likeliest
    next token again and again, up to `stop` or `max_new_tokens`, and reports SQuAD's F1 and exact match, each
    against the reference that fits best, mean over rows, from 0 to 1.

    Args:
        references: the field with the right text, or a list of them; `answers.text` is the field `text` of `answers`.
        answer: Jinja2 template of what to train, over the fields of a row and `reference`. It should end with `stop`,
            or the model does not learn to end; in a chat template it ends as a turn does.
        stop: what ends a generated text.
        max_new_tokens: tokens of a generated text, at most. Long prompts are cut so that they fit.
    """

    references: str
    answer: str = " {{ reference }}\n"
    stop: str = "\n"
    max_new_tokens: int = 50

    objective = "language_modeling"
    num_classes = 1
    validation_metrics = ("f1", "exact_match")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_strings("references", "answer", "stop")
        check_template("answer", self.answer)
        if not self.stop:
            raise ValueError("`stop` must be a text, such as a line break, got ''.")
        require_integer("max_new_tokens", self.max_new_tokens)

    @property
    def label_fields(self) -> frozenset[str]:
        return frozenset([self.references.split(".")[0]])

    @cached_property
    def template_fields(self) -> frozenset[str]:
        return template_fields((self.prompt, self.answer)) - {"reference"}

    def right(self, row: Mapping[str, Any]) -> tuple[int]:
        self.reference_texts(row)
        return (0,)

    def answers_to(self, row: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
        if any(row.get(field) is None for field in self.label_fields):
            return [self.stop]  # nothing to train on: a text will be generated
        return [fill(self.answer, {**values, "reference": self.reference_texts(row)[0]})]

    def reference_texts(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        value: Any = row
        for key in self.references.split("."):
            if not isinstance(value, Mapping) or value.get(key) is None:
                raise ValueError(f"field `{self.references}` is missing or null")
            value = value[key]
        texts = value if isinstance(value, list | tuple) else [value]
        if not texts or not all(map(_is_text, texts)):
            raise ValueError(f"field `{self.references}` must be a text or a list of texts, none empty, got {value!r}")
        return tuple(map(str, texts))


def _is_text(value: Any) -> bool:
    """Whether a value is a number, or a text that is not empty; a truth value or NaN would be Python's notation."""
    if isinstance(value, str):
        return bool(value.strip())
    return math.isfinite(value) if isinstance(value, float) else isinstance(value, int) and not isinstance(value, bool)
