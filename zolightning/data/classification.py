"""Classification of texts and of images, and the base classes of tasks with labels or with candidate answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from zolightning.data.task import Label, Objective, PromptTask, Task
from zolightning.data.templates import check_template, fill, template_fields


@dataclass(frozen=True, kw_only=True)
class LabelledTask(Task):
    """A task that asks which class a row belongs to.

    Args:
        labels: the values of the label field, each once.
        label: the field that holds the label.
        skip_labels: labels of rows that are left out.
    """

    labels: tuple[Label, ...]
    label: str = "label"
    skip_labels: tuple[Label, ...] = ()

    validation_metrics = ("accuracy", "f1")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_strings("label")
        for key in ("labels", "skip_labels"):
            if not all(isinstance(label, Label) for label in getattr(self, key)):
                raise ValueError(f"`{key}` must be integers, strings or booleans, got {list(getattr(self, key))!r}.")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"`labels` must all differ, got {list(self.labels)!r}.")

    @property
    def num_classes(self) -> int:
        return len(self.labels)

    @property
    def label_fields(self) -> frozenset[str]:
        return frozenset([self.label])

    def right(self, row: Mapping[str, Any]) -> tuple[int] | None:
        label = row[self.label]
        if _place(label, self.skip_labels) is not None:
            return None
        place = _place(label, self.labels)
        if place is None:
            hint = ""
            if isinstance(label, str) and any(isinstance(other, bool) for other in self.labels):
                hint = " (quote them: YAML reads a bare yes or no as a boolean)"
            elif isinstance(label, str) and label in map(str, self.labels):
                hint = " (this one is a text; so are all values of a CSV column unless each is a number)"
            raise ValueError(f"label {label!r} in field `{self.label}` must be one of {list(self.labels)!r}{hint}")
        return (place,)


@dataclass(frozen=True, kw_only=True)
class CandidatesTask(PromptTask):
    """A prompt with several candidate answers.

    Args:
        content_free_prompt: Jinja2 template of the prompt without its content, for calibration: answers are then
            compared by how much likelier they are after the prompt than after this one. May be empty.
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
                ' (Quote them: YAML reads a bare Yes or No as a boolean. Write "Yes".)'
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


@dataclass(frozen=True, kw_only=True)
class ImageClassification(LabelledTask):
    """A task that asks which class an image belongs to.

    Args:
        image: the field that holds the image: the path of a file, relative to the folder of the rows, or an image of
            ``datasets``. In folders of images it is `image`, and the label, the name of the folder around it, is
            `label`.
        objective: what is trained: `classification`, the cross-entropy, or `accuracy`, the share of wrong choices,
            which only methods without gradients lower.
    """

    image: str
    objective: Objective = "classification"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_strings("image")
        self._check_objective("classification", "accuracy")
        if len(self.labels) < 2:
            raise ValueError(f"`labels` must be two or more, got {list(self.labels)!r}.")

    @property
    def template_fields(self) -> frozenset[str]:
        return frozenset([self.image])

    def render(self, row: Mapping[str, Any]) -> tuple[str, list[str]]:
        self.check_fields(row, self.template_fields)
        return "", [str(label) for label in self.labels]


def _place(label: Any, labels: Sequence[Label]) -> int | None:
    """The position of a label in a list; truth values and numbers differ, though `True` equals 1 in Python."""
    is_truth = isinstance(label, bool)
    return next((i for i, other in enumerate(labels) if other == label and isinstance(other, bool) == is_truth), None)
