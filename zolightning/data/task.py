"""A task: how a row of a data set becomes a prompt and its candidate answers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import SandboxedEnvironment

from zolightning.packaged import configs, packaged

Objective = Literal["classification", "language_modeling"]
Label = int | str

# the final newline of a template belongs to the prompt
_TEMPLATES = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


@dataclass(frozen=True)
class HubDataset:
    """A data set on the Hugging Face hub and its splits to train and test on.

    Args:
        path: Repository, such as ``nyu-mll/glue``.
        name: Configuration within the repository, such as ``sst2``.
        train: Split that training and validation rows are sampled from.
        test: Split that test rows are sampled from; its labels must be public.
        revision: Branch, tag or commit.
    """

    path: str
    name: str | None = None
    train: str = "train"
    test: str = "validation"
    revision: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and not (value is None and field.default is None):
                raise ValueError(f"`hub.{field.name}` must be a string, got {value!r}.")


@dataclass(frozen=True)
class Task:
    """A prompt, its candidate answers and where the rows come from, as declared in a config file.

    The prompt loses its outer spaces, as in MeZO (Malladi et al., 2023, arXiv:2305.17333, appendix E); a
    space it ends with goes to the front of each answer, so the text of prompt and answer together is what was
    written.

    Args:
        name: Name of the task.
        prompt: Jinja2 template over the fields of a row.
        answers: Jinja2 templates of the candidates; a word without braces is the same for every row.
        labels: The values of the label field, in the order of `answers`.
        label: The field that holds the label.
        objective: What is trained: `classification` compares the candidates, `language_modeling` raises the
            likelihood of the right one. Evaluation compares the candidates in both.
        skip_labels: Labels of rows that are left out.
        num_train, num_validation, num_test: How many rows to take unless the user says otherwise.
        hub: Where to download the rows.
        folder: Folder of JSON lines with the rows.
    """

    name: str
    prompt: str
    answers: tuple[str, ...]
    labels: tuple[Label, ...]
    label: str = "label"
    objective: Objective = "classification"
    skip_labels: tuple[Label, ...] = ()
    num_train: int = 1000
    num_validation: int = 500
    num_test: int = 1000
    hub: HubDataset | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        for key in ("name", "prompt", "label"):
            if not isinstance(getattr(self, key), str):
                raise ValueError(f"`{key}` must be a string, got {getattr(self, key)!r}.")
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
        for key in ("num_train", "num_validation", "num_test"):
            if not isinstance(number := getattr(self, key), int) or number < 1:
                raise ValueError(f"`{key}` must be at least 1, got {number!r}.")
        if self.hub and self.folder:
            raise ValueError("`hub` and `folder` exclude each other: rows come from one of them.")
        for key, sources in (("prompt", [self.prompt]), ("answers", self.answers)):
            for source in sources:
                try:
                    _compile(source)
                except TemplateSyntaxError as error:
                    raise ValueError(f"`{key}` is not a Jinja2 template: {error.message}, in {source!r}.") from None

    @classmethod
    def load(cls, name: str) -> "Task":
        """Reads a task of ``configs/tasks`` by its name, or any task by the path of its YAML file.

        The file is a config with the task's fields under ``data: task:``, or holds nothing but these fields.

        Raises:
            ValueError: There is no such task, or its file is not right; says which file and key.
        """
        tasks = configs() / "tasks"
        path = tasks / f"{name}.yaml"
        if not path.is_file():
            path = packaged(name)
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            names = ", ".join(sorted(file.stem for file in tasks.glob("*.yaml")))
            raise ValueError(f"`data.task` must be one of {names}, or the path of a YAML file, got {name!r}.")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            if isinstance(values, dict) and "data" in values:
                values = (values["data"] or {}).get("task")
            return cls.from_fields(values, path.parent)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_fields(cls, values: Mapping[str, Any], beside: Path | None = None) -> "Task":
        """Makes a task of plain values, such as YAML gives.

        Args:
            values: The fields of this class; ``hub`` as a mapping of its own.
            beside: What a relative ``folder`` starts from; the working directory if not given.

        Raises:
            ValueError: A field is unknown, missing or wrong; says which.
        """
        _check_keys(cls, values, "a task")
        fields = dict(values)
        for key in ("answers", "labels", "skip_labels"):
            if key in fields:
                if not isinstance(fields[key], list | tuple):
                    raise ValueError(f"`{key}` must be a list, got {fields[key]!r}.")
                fields[key] = tuple(fields[key])
        if fields.get("hub") is not None:
            _check_keys(HubDataset, fields["hub"], "`hub`")
            fields["hub"] = HubDataset(**fields["hub"])
        if fields.get("folder") is not None:
            folder = (beside or Path()) / str(fields["folder"])
            fields["folder"] = packaged(str(fields["folder"])) if not folder.exists() else folder.resolve()
        return cls(**fields)

    @cached_property
    def fields(self) -> frozenset[str]:
        """The fields that a row must have: those of the templates, and the label."""
        return self.template_fields | {self.label}

    @cached_property
    def template_fields(self) -> frozenset[str]:
        """The fields that prompt and answers are made of: those of a row without a label."""
        sources = (self.prompt, *self.answers)
        names = (meta.find_undeclared_variables(_TEMPLATES.parse(source)) for source in sources)
        return frozenset(set[str]().union(*names) - _TEMPLATES.globals.keys())

    def candidate(self, label: Any) -> int | None:
        """Returns the index of the answer that `label` stands for, or None if its rows are left out.

        Raises:
            ValueError: The task does not know this label.
        """
        if label in self.skip_labels:
            return None
        # `true` is equal to 1, but hardly meant as the second class.
        if label not in self.labels or isinstance(label, bool):
            raise ValueError(f"label {label!r} in field `{self.label}` must be one of {list(self.labels)!r}")
        return self.labels.index(label)

    def check_fields(self, row: Mapping[str, Any], fields: Iterable[str]) -> None:
        """Raises ValueError if one of `fields` is missing, null or NaN."""
        for field in sorted(fields):
            value = row.get(field)
            if value is None:
                raise ValueError(f"field `{field}` is missing or null; there are {', '.join(row) or 'none'}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"field `{field}` is {value}, which is no value")

    def render(self, row: Mapping[str, Any]) -> tuple[str, list[str]]:
        """Returns the prompt and the candidate answers of a row.

        Raises:
            ValueError: A field is missing, or a template does not fit this row, or writes a list, a mapping or a truth
                value as it stands.
        """
        self.check_fields(row, self.template_fields)
        guarded = {field: _guard(field, row[field]) for field in self.template_fields}
        try:
            prompt = _compile(self.prompt).render(guarded)
            answers = [_compile(answer).render(guarded) for answer in self.answers]
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"the templates do not fit this row: {error}") from None
        space = prompt[len(prompt.rstrip(" ")) :]
        return prompt.strip(" "), [(space + answer).rstrip(" ") for answer in answers]


def chosen_task(task: str | Mapping[str, Any], prompt: str | None, answers: Sequence[str] | None) -> Task:
    """The task that the settings of a data module stand for.

    Args:
        task: name, path or fields of a task.
        prompt: template instead of the task's.
        answers: templates of the candidates instead of the task's.

    Raises:
        ValueError: naming the setting, and what is wrong with it.
    """
    found = Task.load(task) if isinstance(task, str) else _made("task", partial(Task.from_fields, task))
    if prompt is not None:
        found = _made("prompt", partial(replace, found, prompt=prompt))
    if answers is not None:
        found = _made("answers", partial(replace, found, answers=tuple(answers)))
    return found


def _made(setting: str, make: Callable[[], Task]) -> Task:
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"`data.{setting}`: {error}") from None


class _NoText:
    """A value that a template may look into or decide by, but not write: Python's notation is nobody's prompt."""

    field = ""

    def __str__(self) -> str:
        raise ValueError(f"field `{self.field}` is {self!r}, which is no text")


class _Truth(_NoText, int):
    def __repr__(self) -> str:
        return "true" if self else "false"


class _List(_NoText, list[Any]):
    pass


class _Mapping(_NoText, dict[str, Any]):
    pass


def _guard(field: str, value: Any) -> Any:
    guards: dict[type, Callable[[Any], _NoText]] = {bool: _Truth, list: _List, dict: _Mapping}
    for kind, guard in guards.items():
        if isinstance(value, kind):
            guarded = guard(value)
            guarded.field = field
            return guarded
    return value


@lru_cache
def _compile(source: str) -> Template:
    return _TEMPLATES.from_string(source)


def _check_keys(cls: type, values: object, what: str) -> None:
    """Raises ValueError unless `values` is a mapping that has what the dataclass needs and nothing else."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be a mapping of keys to values, got {values!r}.")
    known = {field.name: field.default is MISSING for field in fields(cls)}
    if unknown := [str(key) for key in values if key not in known]:
        raise ValueError(f"{what} has no key `{'`, `'.join(unknown)}`; its keys are {', '.join(known)}.")
    if missing := [key for key, required in known.items() if required and key not in values]:
        raise ValueError(f"{what} needs the key `{'`, `'.join(missing)}`.")
