"""Tasks whose rows carry a label: one of a few values, each a class."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zolightning.data.task import Label, Task


@dataclass(frozen=True, kw_only=True)
class LabelledTask(Task):
    """A task that asks which class a row belongs to.

    Args:
        labels: The values of the label field, each once.
        label: The field that holds the label.
        skip_labels: Labels of rows that are left out.
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
                raise ValueError(f"`{key}` must be numbers or strings, got {list(getattr(self, key))!r}.")
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
        if label in self.skip_labels:
            return None
        # `true` is equal to 1, but hardly meant as the second class.
        if label not in self.labels or isinstance(label, bool):
            raise ValueError(f"label {label!r} in field `{self.label}` must be one of {list(self.labels)!r}")
        return (self.labels.index(label),)
