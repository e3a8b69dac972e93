"""A task: how a row of a data set becomes a prompt and its answers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from zolightning.checks import require_integer
from zolightning.data.templates import MASK, check_template, fill, guarded

Objective = Literal["classification", "accuracy", "language_modeling", "regression"]
Label = int | str


@dataclass(frozen=True)
class HubDataset:
    """A data set on the Hugging Face hub and its splits to train and test on."""

    path: str  # repository, such as ``nyu-mll/glue``
    name: str | None = None  # configuration within the repository, such as ``sst2``
    train: str = "train"  # split that training and validation rows are sampled from
    test: str = "validation"  # split that test rows are sampled from; its labels must be public
    revision: str | None = None  # branch, tag or commit

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and not (value is None and field.default is None):
                raise ValueError(f"`hub.{field.name}` must be a string, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Abstract base of tasks, as declared in a config file: where rows come from, and what a subclass makes of them.

    Args:
        name: name of the task.
        num_train, num_validation, num_test: how many rows to take unless the user says otherwise.
        hub: where to download the rows.
        folder: folder with files of rows.
    """

    name: str
    num_train: int = 1000
    num_validation: int = 500
    num_test: int = 1000
    hub: HubDataset | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        self._check_strings("name")
        for key in ("num_train", "num_validation", "num_test"):
            require_integer(key, getattr(self, key))
        if self.hub and self.folder:
            raise ValueError("`hub` and `folder` exclude each other: rows come from one of them.")

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """What is trained: `classification` compares the candidates by their likelihood, `accuracy` counts the right
        choices, which has no gradient, `language_modeling` raises the likelihood of the right one, and `regression`
        predicts a number."""

    @property
    @abstractmethod
    def num_classes(self) -> int | None:
        """How many candidates there are, if they are the same for all rows; 1 if none are compared."""

    @property
    @abstractmethod
    def validation_metrics(self) -> tuple[str, ...]:
        """What a validation reports, besides the loss."""

    @property
    @abstractmethod
    def label_fields(self) -> frozenset[str]:
        """The fields that tell the right answer: those that a row without a label may lack."""

    @property
    def right_fields(self) -> frozenset[str]:
        """The fields that :meth:`right` reads."""
        return self.label_fields

    @property
    @abstractmethod
    def template_fields(self) -> frozenset[str]:
        """The fields that prompt and answers are made of."""

    @abstractmethod
    def right(self, row: Mapping[str, Any]) -> tuple[int, ...] | None:
        """The indices of the right answers, the one to train on first, or None if the row is left out.

        Raises:
            ValueError: if the row's label is not one of the task's.
        """

    @abstractmethod
    def render(self, row: Mapping[str, Any]) -> tuple[str, list[str]]:
        """Returns the prompt and the answers of a row.

        Raises:
            ValueError: if a field is missing, or a template does not fit this row, or writes a list, a mapping or a
                truth value as it stands.
        """

    def reference_texts(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The texts that a generated one is compared with; none where nothing is generated."""
        return ()

    @cached_property
    def fields(self) -> frozenset[str]:
        """The fields that a row must have."""
        return self.template_fields | self.label_fields

    def check_fields(self, row: Mapping[str, Any], fields: Iterable[str]) -> None:
        """Raises ValueError if one of `fields` is missing, null or NaN."""
        for field in sorted(fields):
            value = row.get(field)
            if value is None:
                there = ", ".join(f"`{name}`" for name in row) or "none"
                raise ValueError(f"field `{field}` is missing or null; there are {there}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"field `{field}` is {value}, which is not a value")

    def _check_objective(self, *accepted: Objective) -> None:
        if self.objective not in accepted:
            raise ValueError(f"`objective` must be one of {accepted}, got {self.objective!r}.")

    def _check_strings(self, *keys: str) -> None:
        for key in keys:
            if not isinstance(getattr(self, key), str):
                raise ValueError(f"`{key}` must be a string, got {getattr(self, key)!r}.")


@dataclass(frozen=True, kw_only=True)
class PromptTask(Task):
    """A task whose prompt is a template.

    The prompt loses its outer spaces, as in MeZO (Malladi et al., 2023, arXiv:2305.17333, appendix E); a
    space it ends with goes to the front of each answer, so that prompt and answer together read as they were
    written. If the prompt has a mask, where the answer stands for masked language models, the space before that does.

    Args:
        prompt: Jinja2 template over the fields of a row; `{{ mask }}` and `{{ sep }}` in it are the model's mask and
            its separator of two texts.
    """

    prompt: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_strings("prompt")
        check_template("prompt", self.prompt)

    @abstractmethod
    def answers_to(self, row: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
        """The answers of a row, to compare or to train on; `values` are its `template_fields`."""

    def render(self, row: Mapping[str, Any]) -> tuple[str, list[str]]:
        return self.written(self.prompt, row)

    def written(self, template: str, row: Mapping[str, Any]) -> tuple[str, list[str]]:
        """Returns the prompt that a template makes of a row, and the answers."""
        self.check_fields(row, self.template_fields)
        values = guarded(row, self.template_fields)
        prompt = fill(template, values)
        answers = self.answers_to(row, values)
        if f" {MASK}" in prompt:
            prompt, answers = prompt.replace(f" {MASK}", MASK), [f" {answer.lstrip(' ')}" for answer in answers]
        space = "" if MASK in prompt else prompt[len(prompt.rstrip(" ")) :]
        return prompt.strip(" "), [(space + answer).rstrip(" ") for answer in answers]
