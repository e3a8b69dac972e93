"""Tasks from config files and from plain values, such as YAML gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from zolightning.data.classification import Classification, ImageClassification
from zolightning.data.generation import Generation
from zolightning.data.language_modeling import Completion, Conversation, PlainText
from zolightning.data.multiple_choice import MultipleChoice
from zolightning.data.regression import Regression
from zolightning.data.task import HubDataset, PromptTask, Task
from zolightning.packaged import configs, packaged

# Any alone would say as much, but then jsonargparse 4.53 writes the "Yes" of a list as `true` to a run's config.yaml
TaskFields = dict[str, list[str] | dict[str, str | None] | Any]
"""The fields of a task, by name."""

# by the field that no other kind has; checked in this order
KINDS: dict[str, type[Task]] = {
    "answers": Classification,
    "choices": MultipleChoice,
    "references": Generation,
    "answer": Completion,
    "messages": Conversation,
    "image": ImageClassification,
    "text": PlainText,
    "target": Regression,
}


def load_task(name: str) -> Task:
    """Reads a task of ``configs/tasks`` by its name, or any task by the path of its YAML file.

    The file is a config with the task's fields under ``data: task:``, or holds nothing but these fields.

    Raises:
        ValueError: if there is no such task, or its file is not right; says which file and key.
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
        return task_of(values, path.parent)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from None


def task_of(values: Mapping[str, Any], beside: Path | None = None) -> Task:
    """Makes a task of plain values: the fields of one of its kinds, with ``hub`` as a mapping of its own.

    A relative ``folder`` is looked for in the folder `beside`, or else in the working directory.

    Raises:
        ValueError: if a field is unknown, missing or wrong; says which.
    """
    named = [kind for field, kind in KINDS.items() if isinstance(values, Mapping) and field in values]
    kind = named[0] if named else Classification
    _check_keys(kind, values, "a task")
    # jsonargparse turns a null that is given as a flag into this text, `--data.task.content_free_prompt null`
    settings: dict[str, Any] = {key: None if value == "None" else value for key, value in values.items()}
    for key in ("answers", "labels", "skip_labels"):
        if key in settings:
            if not isinstance(settings[key], list | tuple):
                raise ValueError(f"`{key}` must be a list, got {settings[key]!r}.")
            settings[key] = tuple(settings[key])
    if settings.get("hub") is not None:
        _check_keys(HubDataset, settings["hub"], "`hub`")
        settings["hub"] = HubDataset(**settings["hub"])
    if settings.get("folder") is not None:
        folder = (beside or Path()) / str(settings["folder"])
        settings["folder"] = packaged(str(settings["folder"])) if not folder.exists() else folder.resolve()
    return kind(**settings)


def chosen_task(task: str | Mapping[str, Any], prompt: str | None = None, answers: Sequence[str] | None = None) -> Task:
    """The task that these settings of :class:`~zolightning.data.PromptDataModule` stand for.

    Raises:
        ValueError: naming the setting, and what is wrong with it.
    """
    found = load_task(task) if isinstance(task, str) else _made("task", partial(task_of, task))
    if prompt is not None:
        if not isinstance(found, PromptTask):
            raise ValueError(f"`data.prompt` does not work with task {found.name}, which has no prompt.")
        found = _made("prompt", partial(replace, found, prompt=prompt))
    if answers is not None:
        if not isinstance(found, Classification):
            raise ValueError(f"`data.answers` is for tasks with classes; task {found.name} makes its own of each row.")
        found = _made("answers", partial(replace, found, answers=tuple(answers)))
    return found


def _made(setting: str, make: Callable[[], Task]) -> Task:
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"`data.{setting}`: {error}") from None


def _check_keys(cls: type, values: object, what: str) -> None:
    """Raises ValueError unless `values` is a mapping that has what the dataclass needs and nothing else."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be a mapping of keys to values, got {values!r}.")
    known = {field.name: field.default is MISSING for field in fields(cls)}
    others = "`, `".join(list(KINDS)[1:])
    hint = f" (unless one of `{others}` makes it another kind of task)" if cls is Classification else ""
    if unknown := [str(key) for key in values if key not in known]:
        keys = sorted(known, key=lambda key: not known[key])  # those it needs first
        raise ValueError(f"{what} has no key `{'`, `'.join(unknown)}`; its keys are {', '.join(keys)}{hint}.")
    if missing := [key for key, required in known.items() if required and key not in values]:
        raise ValueError(f"{what} needs the key `{'`, `'.join(missing)}`{hint}.")
