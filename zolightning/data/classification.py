"""Classification: the same candidate answers for every row, of which a label names the right one."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

from zolightning.data.task import Label, Objective, PromptTask
from zolightning.data.templates import check_template, fill, template_fields


@dataclass(frozen=True, kw_only=True)
class Classification(PromptTask):
    """A prompt whose candidate answers stand for the values of a label.

    Args:
        answers: Jinja2 templates of the candidates; a word without braces is the same for every row.
        labels: The values of the label field, in the order of `answers`.
        label: The field that holds the label.
        objective: What is trained. Evaluation compares the candidates with both objectives.
        skip_labels: Labels of rows that are left out.
    """

    answers: tuple[str, ...]
    labels: tuple[Label, ...]
    label: str = "label"
    objective: Objective = "classification"
    skip_labels: tuple[Label, ...] = ()

    validation_metrics = ("accuracy", "f1")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_strings("label")
        if len(self.answers) < 2 or not all(isinstance(answer, str) for answer in self.answers):
            raise ValueError(
                f"`answers` must be two strings or more, got {list(self.answers)!r}."
                ' (Quote them: YAML reads a bare Yes or No as a truth value. Write "Yes".)'
            )
        for key in ("labels", "skip_labels"):
            if not all(isinstance(label, Label) for label in getattr(self, key)):
                raise ValueError(f"`{key}` must be numbers or strings, got {list(getattr(self, key))!r}.")
        if len(self.labels) != len(self.answers):
            raise ValueError(
                f"`labels` must name one label for each of the {len(self.answers)} `answers`, "
                f"got {len(self.labels)}: {list(self.labels)!r}."
            )
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"`labels` must all differ, got {list(self.labels)!r}.")
        if self.objective not in get_args(Objective):
            raise ValueError(f"`objective` must be one of {get_args(Objective)}, got {self.objective!r}.")
        for answer in self.answers:
            check_template("answers", answer)

    @property
    def num_classes(self) -> int:
        return len(self.answers)

    @property
    def label_fields(self) -> frozenset[str]:
        return frozenset([self.label])

    @cached_property
    def template_fields(self) -> frozenset[str]:
        return template_fields((self.prompt, *self.answers))

    def right(self, row: Mapping[str, Any]) -> tuple[int] | None:
        label = row[self.label]
        if label in self.skip_labels:
            return None
        # `true` is equal to 1, but hardly meant as the second class.
        if label not in self.labels or isinstance(label, bool):
            raise ValueError(f"label {label!r} in field `{self.label}` must be one of {list(self.labels)!r}")
        return (self.labels.index(label),)

    def answers_to(self, row: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
        return [fill(answer, values) for answer in self.answers]
