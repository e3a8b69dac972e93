"""Tasks whose rows carry a label: one of a few values, each a class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zolightning.data.task import Label, Task


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
                raise ValueError(
                    f"`{key}` must be whole numbers, strings or truth values, got {list(getattr(self, key))!r}."
                )
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
            is_unquoted = isinstance(label, str) and any(isinstance(other, bool) for other in self.labels)
            hint = " (quote them: YAML reads a bare yes or no as a truth value)" if is_unquoted else ""
            raise ValueError(f"label {label!r} in field `{self.label}` must be one of {list(self.labels)!r}{hint}")
        return (place,)


def _place(label: Any, labels: Sequence[Label]) -> int | None:
    """Where a label stands among others. `true` is equal to 1, but hardly meant as the second class."""
    is_truth = isinstance(label, bool)
    return next((i for i, other in enumerate(labels) if other == label and isinstance(other, bool) == is_truth), None)
