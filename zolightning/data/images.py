"""Reads images, from files or from the bytes that data sets hold, into batches; a ValueError names one that fails."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, TypedDict

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from zolightning.data.task import Objective


@dataclass(frozen=True)
class ImageExample:
    """An image that is read when a batch needs it."""

    id: int  # where its row stands in its source, counted from 0
    where: str  # the row and its source, for messages
    image: Path | bytes  # the file, or its content
    label: int  # index of its class; -1 if it is not known

    @property
    def length(self) -> int:
        """1 for every image, so that batches are not sorted by length."""
        return 1


class ImageBatch(TypedDict):
    """B images."""

    objective: Objective
    pixel_values: Tensor  # (B, channels, height, width), float32, as the model's processor makes them
    label: Tensor  # (B,), index of the class, -1 if it is not known
    id: Tensor  # (B,), where the image stands in its source


def require_pillow() -> None:
    """Raises MisconfigurationException unless Pillow is installed, which reads images."""
    if find_spec("PIL") is None:
        raise MisconfigurationException("Images need Pillow, which is not installed: pip install 'zolightning[images]'")


def image_of(value: Any, folder: Path | None) -> Path | bytes:
    """The file of an image, or its content, given the value of a row's field.

    The value is a path, relative to `folder` or else to the working directory, or the bytes of a file, or one of these
    in the form of ``datasets``, ``{"bytes": ..., "path": ...}``.

    Raises:
        ValueError: if it is none of these, or there is no such file.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"must be the path of an image, or its bytes, got {value!r}")
    path = (folder or Path()) / value
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return path


@contextmanager
def opened(image: Path | bytes) -> Iterator[Any]:
    """A context with a Pillow image, of which only the first bytes have been read (in less than 0.1 ms)."""
    from PIL import Image

    try:
        with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as found:
            yield found
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = f" ({image})" if isinstance(image, Path) else ""
        raise ValueError(f"the image{name} cannot be read: {error}") from None


def read_image(example: ImageExample) -> Any:
    """The image as a Pillow image, in RGB and the right way up."""
    from PIL import ImageOps

    try:
        with opened(example.image) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except ValueError as error:
        raise ValueError(f"{example.where}: {error}.") from None


def collate_images(
    examples: Sequence[ImageExample], processor: Callable[..., Any], objective: Objective = "classification"
) -> ImageBatch:
    """Reads images, one at least, into a batch, by the model's image processor."""
    return ImageBatch(
        # first, because Lightning infers the batch size from the entries that follow what has no size
        objective=objective,
        pixel_values=processor(images=list(map(read_image, examples)), return_tensors="pt")["pixel_values"],
        label=torch.tensor([example.label for example in examples]),
        id=torch.tensor([example.id for example in examples]),
    )
