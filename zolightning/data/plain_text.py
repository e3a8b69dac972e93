"""Plain text: language modelling of whole texts."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from zolightning.data.single_answer import SingleAnswer
from zolightning.data.templates import check_template, fill, guarded, template_fields


@dataclass(frozen=True, kw_only=True)
class PlainText(SingleAnswer):
    """Texts of which every token but the first is trained; validation reports the loss, the mean over tokens.

    A text that is too long loses its end. Nothing is appended.

    Args:
        text: Jinja2 template over the fields of a row, such as ``{{ text }}``.
    """

    text: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_strings("text")
        check_template("text", self.text)
        if not self.template_fields:
            raise ValueError(f"`text` must name a field, such as {{{{ text }}}}, got {self.text!r}.")

    @cached_property
    def template_fields(self) -> frozenset[str]:
        return template_fields([self.text])

    def render(self, row: Mapping[str, Any]) -> tuple[str, list[str]]:
        self.check_fields(row, self.template_fields)
        text = fill(self.text, guarded(row, self.template_fields))
        if not text.strip():
            raise ValueError("the text is empty")
        return "", [text]
