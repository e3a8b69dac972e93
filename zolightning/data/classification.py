"""Classification: the same candidate answers for every row, of which a label names the right one."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from zolightning.data.candidates import CandidatesTask
from zolightning.data.labelled import LabelledTask
from zolightning.data.task import Objective
from zolightning.data.templates import check_template, fill, template_fields


@dataclass(frozen=True, kw_only=True)
class Classification(LabelledTask, CandidatesTask):
    """A prompt whose candidate answers stand for the values of a label.

    Args:
        answers: Jinja2 templates of the candidates; a word without braces is the same for every row.
        labels: the values of the label field, in the order of `answers`.
        objective: what is trained: `classification`, the cross-entropy among the candidates; `accuracy`, the share of
            wrong choices, which only methods without gradients lower; or `language_modeling`, the likelihood of the
            right one. Evaluation compares the candidates with each of them.
    """

    answers: tuple[str, ...]
    objective: Objective = "classification"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.answers) < 2 or not all(isinstance(answer, str) for answer in self.answers):
            raise ValueError(
                f"`answers` must be two strings or more, got {list(self.answers)!r}."
                ' (Quote them: YAML reads a bare Yes or No as a truth value. Write "Yes".)'
            )
        if len(self.labels) != len(self.answers):
            raise ValueError(
                f"`labels` must name one label for each of the {len(self.answers)} `answers`, "
                f"got {len(self.labels)}: {list(self.labels)!r}."
            )
        self._check_objective("classification", "accuracy", "language_modeling")
        for answer in self.answers:
            check_template("answers", answer)

    @cached_property
    def template_fields(self) -> frozenset[str]:
        return template_fields((*self.prompts, *self.answers))

    def answers_to(self, row: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
        return [fill(answer, values) for answer in self.answers]
