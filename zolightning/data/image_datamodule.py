"""Images and their classes for a Trainer."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from zolightning.data.classification import ImageClassification
from zolightning.data.images import ImageBatch, ImageExample, collate_images, image_of, opened, require_pillow
from zolightning.data.row import Row
from zolightning.data.source import NO_LABEL
from zolightning.data.task_datamodule import TaskDataModule
from zolightning.data.task_files import TaskFields, chosen_task


class ImageDataModule(TaskDataModule):
    """Batches of images with their classes, made by the image processor of the model that the Trainer runs.

    In a folder, `train`, `test` and optionally `validation` are folders that have a folder of images for each class, or
    files of rows with paths of images. An image is read when a batch needs it; before training its first bytes are
    checked.

    The LightningModule must have a `preprocessor`.

    Args:
        task: path of a YAML file with an image task, or the fields of an
            :class:`~zolightning.data.ImageClassification` themselves.
        path: folder of images, or of files of rows, instead of the hub.
        **settings: how many images are sampled, and how they make batches, see :class:`TaskDataModule`.

    Example:
        >>> data = ImageDataModule({"name": "pets", "image": "image", "labels": ["cat", "dog"]}, path="pets")
        >>> trainer.fit(model, datamodule=data)  # doctest: +SKIP

    Raises:
        ValueError: if an argument is not what it should be.
        MisconfigurationException: if Pillow is not installed.
    """

    def __init__(self, task: str | TaskFields, path: str | None = None, **settings: Any) -> None:
        require_pillow()
        chosen = chosen_task(task)
        if not isinstance(chosen, ImageClassification):
            raise ValueError(
                f"ImageDataModule needs a task with `image`, the field of an image: {chosen.name} has none."
            )
        super().__init__(chosen, path, **settings)

    def check_row(self, row: Row) -> None:
        self._example(row)

    def encode(self, name: str, rows: Sequence[Row]) -> list[ImageExample]:
        module = self.module()
        if "pixel_values" not in getattr(getattr(module, "preprocessor", None), "model_input_names", ()):
            raise TypeError(
                f"ImageDataModule makes images for a model: {type(module).__name__} must have a `preprocessor` that is "
                "an image processor of transformers, as ImageClassifier has."
            )
        return list(map(self._example, rows))

    def collate(self, for_training: bool) -> partial[ImageBatch]:
        return partial(collate_images, processor=self.module().preprocessor, objective=self.task.objective)

    def _example(self, row: Row) -> ImageExample:
        assert isinstance(self.task, ImageClassification), "the constructor has looked"
        field = self.task.image
        try:
            image = image_of(row.fields[field], self.folder)
            with opened(image):
                pass
        except ValueError as error:
            raise ValueError(f"Task {self.task.name}, {row.where}, field `{field}`: {error}.") from None
        return ImageExample(row.id, row.where, image, row.right[0] if row.right else NO_LABEL)
