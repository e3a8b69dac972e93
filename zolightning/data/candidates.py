"""The base class of tasks with candidate answers to compare."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zolightning.data.task import PromptTask
from zolightning.data.templates import check_template


@dataclass(frozen=True, kw_only=True)
class CandidatesTask(PromptTask):
    """A prompt with several candidate answers.

    Args:
        content_free_prompt: Jinja2 template of what is left of the prompt without its content, for calibration: an
            answer then counts by how much likelier the prompt makes it. May be empty.
    """

    content_free_prompt: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.content_free_prompt is not None:
            self._check_strings("content_free_prompt")
            check_template("content_free_prompt", self.content_free_prompt)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The templates of the prompt with its content and, if there is one, without."""
        return (self.prompt,) if self.content_free_prompt is None else (self.prompt, self.content_free_prompt)

    def render_content_free(self, row: Mapping[str, Any]) -> tuple[str, list[str]] | None:
        """Returns the content-free prompt and the answers of a row, as :meth:`render` does; None if there is none."""
        return None if self.content_free_prompt is None else self.written(self.content_free_prompt, row)
