"""Regression: a text, or two, and the number that it should be given."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from zolightning.data.task import PromptTask
from zolightning.data.templates import template_fields

_LARGEST = 3.4e38  # of the numbers that a float32 holds


@dataclass(frozen=True, kw_only=True)
class Regression(PromptTask):
    """A text, or two, and the number to predict for it, such as how similar two sentences are.

    A network with a single output is trained by the mean squared error; validation reports the correlations of Pearson
    and of Spearman.

    Args:
        target: the field with the number.
    """

    target: str

    objective = "regression"
    num_classes = 1
    validation_metrics = ("pearson", "spearman")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_strings("target")

    @property
    def label_fields(self) -> frozenset[str]:
        return frozenset([self.target])

    @cached_property
    def template_fields(self) -> frozenset[str]:
        return template_fields((self.prompt,))

    def right(self, row: Mapping[str, Any]) -> tuple[int]:
        self.number(row)
        return (0,)

    def number(self, row: Mapping[str, Any]) -> float:
        """The number of a row. Raises a ValueError if it is not a number."""
        value = row[self.target]
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (OverflowError, TypeError, ValueError):
            number = math.nan
        if not abs(number) <= _LARGEST:
            raise ValueError(f"field `{self.target}` must be a number, at most {_LARGEST:.2g}, got {value!r}")
        return number

    def answers_to(self, row: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
        return [str(row.get(self.target))]
