"""Images and their classes for a Trainer."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from zolightning.data.image_classification import ImageClassification
from zolightning.data.images import ImageBatch, ImageExample, collate_images, image_of, opened, require_pillow
from zolightning.data.row import Row
from zolightning.data.source import NO_LABEL
from zolightning.data.task_datamodule import TaskDataModule
from zolightning.data.task_files import chosen_task


class ImageDataModule(TaskDataModule):
    """Batches of images with their classes, made for the model that the Trainer runs by its image processor.

    Images come from the Hugging Face hub or from a folder, and are sampled as rows of text are. In the folder, `train`,
    `test` and optionally `validation` are folders that have a folder of images for each class, or files of rows with
    paths of images. An image is read when a batch needs it; that it is one is seen by its first bytes before training.

    The LightningModule must have a `preprocessor`.

    Args:
        task: path of a YAML file with an image task, or the fields of an
            :class:`~zolightning.data.ImageClassification` themselves.
        path: folder of images, or of files of rows, instead of the hub.
        batch_size: training images a batch, on each rank.
        eval_batch_size: images a batch otherwise; `batch_size` if not given.
        num_train: training images to sample; the task's number, mostly 1000, if not given.
        num_validation: validation images to sample; the task's number, mostly 500, if not given.
        num_test: test images to sample; the task's number, mostly 1000, if not given.
        examples_per_class: sample this many images of each class for training, and again for validation,
            instead of `num_train` and `num_validation` of all.
        seed: decides which images are sampled and the order of the training batches.
        fixed_batches: whether every epoch has the same training batches, in an order of its own, for
            `keep_prefix_gib` of the ZerothOrder callback.
        num_workers: processes that read images and build batches.

    Example:
        >>> data = ImageDataModule({"name": "pets", "image": "image", "labels": ["cat", "dog"]}, path="pets")
        >>> trainer.fit(model, datamodule=data)  # doctest: +SKIP

    Raises:
        ValueError: if an argument is not what it should be.
        MisconfigurationException: if Pillow is not installed.
    """

    def __init__(
        self,
        task: str | dict[str, Any],
        path: str | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_train: int | None = None,
        num_validation: int | None = None,
        num_test: int | None = None,
        examples_per_class: int | None = None,
        seed: int = 0,
        fixed_batches: bool = False,
        num_workers: int = 0,
    ) -> None:
        require_pillow()
        chosen = chosen_task(task)
        if not isinstance(chosen, ImageClassification):
            raise ValueError(
                f"ImageDataModule needs a task with `image`, the field of an image: {chosen.name} has none."
            )
        super().__init__(
            chosen,
            path,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_train=num_train,
            num_validation=num_validation,
            num_test=num_test,
            examples_per_class=examples_per_class,
            seed=seed,
            fixed_batches=fixed_batches,
            num_workers=num_workers,
        )

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
