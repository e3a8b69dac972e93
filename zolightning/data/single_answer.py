"""Rows with one answer each, which is trained by its likelihood."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zolightning.data.task import Task


@dataclass(frozen=True, kw_only=True)
class SingleAnswer(Task):
    """A task in which nothing is compared: validation reports the loss of the answers, and no row lacks a label."""

    objective = "language_modeling"
    num_classes = 1
    validation_metrics = ()
    label_fields = frozenset[str]()

    def right(self, row: Mapping[str, Any]) -> tuple[int]:
        return (0,)
