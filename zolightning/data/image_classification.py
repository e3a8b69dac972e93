"""Image classification: rows with an image, of which a label names the class."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zolightning.data.labelled import LabelledTask
from zolightning.data.task import Objective


@dataclass(frozen=True, kw_only=True)
class ImageClassification(LabelledTask):
    """A task that asks which class an image is of.

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
