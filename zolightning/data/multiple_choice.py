"""Multiple choice: every row brings its own candidates, of any number and length, and says which are right."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from zolightning.data.classification import CandidatesTask
from zolightning.data.task import Objective
from zolightning.data.templates import check_template, fill, template_fields


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(CandidatesTask):
    """A prompt whose candidate answers are made of a list in the row; any of several may be right.

    The first right one is trained by its likelihood, as MeZO trains ReCoRD; a choice counts if it is any of them.

    Args:
        choices: the field with the list of choices, texts or numbers. Repeated ones count once.
        answer: Jinja2 template of the answer, over the fields of a row and `choice`.
        right_choices: the field with the choice that is right, or the list of those that are.
        objective: what is trained: `language_modeling`, or `accuracy`, the share of wrong choices, which only methods
            without gradients lower.
    """

    choices: str
    answer: str
    right_choices: str
    objective: Objective = "language_modeling"

    num_classes = None
    validation_metrics = ("accuracy",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_strings("choices", "answer", "right_choices")
        self._check_objective("language_modeling", "accuracy")
        check_template("answer", self.answer)

    @property
    def label_fields(self) -> frozenset[str]:
        return frozenset([self.right_choices])

    @property
    def right_fields(self) -> frozenset[str]:
        return frozenset([self.choices, self.right_choices])

    @cached_property
    def template_fields(self) -> frozenset[str]:
        return (template_fields((*self.prompts, self.answer)) - {"choice"}) | {self.choices}

    def right(self, row: Mapping[str, Any]) -> tuple[int, ...]:
        choices, right = self._choices(row), row[self.right_choices]
        right = right if isinstance(right, list | tuple) else [right]
        found = list(dict.fromkeys(choices.index(choice) for choice in right if choice in choices))
        if not found:
            raise ValueError(
                f"field `{self.right_choices}` is {right!r}, which is not in `{self.choices}`, {choices!r} "
                "(it must be the choice itself; if it is a number or letter, make it the `label` of a task with "
                "`answers`)"
            )
        return tuple(found)

    def answers_to(self, row: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
        return [fill(self.answer, {**values, "choice": choice}) for choice in self._choices(row)]

    def _choices(self, row: Mapping[str, Any]) -> list[Any]:
        choices = row[self.choices]
        if not isinstance(choices, list | tuple) or not all(
            isinstance(choice, str | int | float) for choice in choices
        ):
            raise ValueError(f"field `{self.choices}` must be a list of texts or numbers, got {choices!r}")
        distinct = list(dict.fromkeys(choices))
        if len(distinct) < 2:
            raise ValueError(f"field `{self.choices}` must have two choices or more, got {choices!r}")
        return distinct
