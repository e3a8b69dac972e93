"""Completion: a prompt and the text that should follow it, such as instructions and their outputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from zolightning.data.single_answer import SingleAnswer
from zolightning.data.task import PromptTask
from zolightning.data.templates import check_template, fill, template_fields


@dataclass(frozen=True, kw_only=True)
class Completion(SingleAnswer, PromptTask):
    """A prompt whose right continuation is trained by its likelihood; validation reports the loss.

    The continuation ends with the tokenizer's end of a text, or of an assistant's turn in a chat template, so that a
    model learns where to end.

    Args:
        answer: Jinja2 template of the continuation, over the fields of a row.
    """

    answer: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_strings("answer")
        check_template("answer", self.answer)

    @cached_property
    def template_fields(self) -> frozenset[str]:
        return template_fields((self.prompt, self.answer))

    def answers_to(self, row: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
        return [fill(self.answer, values)]
