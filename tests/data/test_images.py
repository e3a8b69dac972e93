"""Images from folders, rows and data sets: which are read, as what, and what is wrong with one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from zolightning.data import ImageDataModule, PromptDataModule

PETS = {"name": "pets", "image": "image", "labels": ["cat", "dog"]}


def draw(path: Path, shade: int, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade if mode == "L" else (shade, 0, 255)).save(path)
    return path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Ten cats and ten dogs, each of a shade of its own: cats have even ones."""
    for split in ("train", "test"):
        for number in range(20):
            draw(tmp_path / split / ("cat", "dog")[number % 2] / f"{number:02}.png", 10 * number)
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    (tmp_path / "train/cat/._00.png").write_text("no image")
    return tmp_path


class Looker(L.LightningModule):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocessor = ViTImageProcessorPil(
            size={"height": 2, "width": 2}, image_mean=[0.0] * 3, image_std=[1.0] * 3
        )
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[dict[str, Any]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch)
        return self.weight.square()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.seen.append(batch)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pass

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[int]:
        self.seen.append(batch)
        return batch["id"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def look(data: L.LightningDataModule, make_trainer: Callable[..., L.Trainer], run: str = "test") -> dict[str, Any]:
    module = Looker()
    trainer = make_trainer(max_epochs=1, limit_val_batches=0)
    getattr(trainer, run)(module, datamodule=data)
    return {
        name: np.concatenate([batch[name].numpy() for batch in module.seen]) for name in ("id", "label", "pixel_values")
    }


@pytest.mark.parametrize("form", ["folders", "jsonl", "parquet"])
def test_images_and_labels_are_those_of_their_rows(
    form: str, pets: Path, make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    folder = pets
    if form != "folders":
        rows = [
            {"image": str(path.relative_to(pets)), "label": path.parent.name} for path in sorted(pets.glob("test/*/*"))
        ]
        if form == "jsonl":
            (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            folder = tmp_path / "parquet"
            folder.mkdir()
            images = [{"bytes": (pets / row["image"]).read_bytes(), "path": None} for row in rows]
            pq.write_table(
                pa.table({"image": images, "label": [row["label"] for row in rows]}), folder / "test.parquet"
            )
    found = look(ImageDataModule(PETS, str(folder), batch_size=3), make_trainer)
    assert sorted(found["id"]) == list(range(20))
    shades = np.rint(found["pixel_values"][:, 0, 0, 0] * 255 / 10).astype(int)
    assert (found["label"] == shades % 2).all()
    # cats come first, each class in the order of its names
    assert shades.tolist() == [2 * id if id < 10 else 2 * id - 19 for id in found["id"]]
    assert found["pixel_values"].shape == (20, 3, 2, 2)
    assert (found["pixel_values"][:, 1] == 0).all() and (found["pixel_values"][:, 2] == 1).all()


def test_a_class_has_as_many_examples_as_asked_for_and_images_without_labels_are_predicted(
    pets: Path, make_trainer: Callable[..., L.Trainer]
) -> None:
    data = ImageDataModule(PETS | {"objective": "accuracy"}, str(pets), batch_size=2, examples_per_class=3)
    found = look(data, make_trainer, "fit")
    assert sorted(found["label"]) == [0, 0, 0, 1, 1, 1]
    draw(pets / "test/unknown.png", 7)
    found = look(ImageDataModule(PETS, str(pets)), make_trainer, "predict")
    assert sorted(found["label"]) == [-1] + [0] * 10 + [1] * 10


def test_gray_and_turned_images_are_read_in_color_and_the_right_way_up(
    tmp_path: Path, make_trainer: Callable[..., L.Trainer]
) -> None:
    draw(tmp_path / "test/cat/gray.png", 255, mode="L")
    turned = Image.new("RGB", (2, 2), (255, 0, 0))
    turned.putpixel((0, 0), (0, 0, 255))
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "test/dog.png", exif=exif)
    found = look(ImageDataModule(PETS, str(tmp_path)), make_trainer, "predict")
    gray, dog = found["pixel_values"][found["id"].argsort()]
    assert (gray == 1).all()
    assert dog[2].tolist() == [[0, 0], [0, 1]]


def test_what_is_wrong_is_said_in_a_line(pets: Path, make_trainer: Callable[..., L.Trainer]) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            look(ImageDataModule(PETS, str(pets)), make_trainer)

    (pets / "test/cat/00.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"pets, .*test, row 0, field `image`: the image \(.*00\.png\) cannot be read"):
        ImageDataModule(PETS, str(pets)).check_rows("test")
    refused(r"test, row 0, field `image`: the image \(.*00\.png\) cannot be read")
    whole = draw(pets / "test/cat/00.png", 7, (90, 90)).read_bytes()
    (pets / "test/cat/00.png").write_bytes(whole[:-40])  # not seen by its first bytes
    refused(r"test, row 0: the image \(.*00\.png\) cannot be read")
    draw(pets / "test/bird/0.png", 7)
    refused(r"test, row 0: label 'bird' in field `label` must be one of")
    (pets / "test.jsonl").write_text('{"image": "nowhere.png", "label": "cat"}\n')
    refused(r"line 1, field `image`: there is no file .*nowhere\.png")
    (pets / "test.jsonl").write_text('{"image": 3, "label": "cat"}\n')
    refused(r"line 1, field `image`: must be the path of an image.*got 3")
    with pytest.raises(ValueError, match="ImageDataModule needs a task with `image`"):
        ImageDataModule("sst2", str(pets))
    with pytest.raises(ValueError, match=r"pets classifies images: `data.class_path` must be ImageDataModule"):
        PromptDataModule(PETS, str(pets))
    (pets / "empty/test").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"empty/test is a folder without images .* no file of rows, such as test\.jsonl"
    ):
        look(ImageDataModule(PETS, str(pets / "empty")), make_trainer)
    (pets / "test").rename(pets / "val")
    (pets / "test.jsonl").unlink()
    with pytest.raises(ValueError, match="has no folder validation, but found val: rename it to validation"):
        look(ImageDataModule(PETS, str(pets)), make_trainer, "fit")


def test_images_of_the_hub_are_kept_as_files(
    pets: Path, make_trainer: Callable[..., L.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(pets.glob("test/*/*"))
    columns = {"img": list(map(str, paths)), "label": [index // 10 for index in range(20)]}
    dataset = datasets.Dataset.from_dict(columns).cast_column("img", datasets.Image())
    monkeypatch.setattr("zolightning.data.source._load_dataset", lambda hub, name, task: dataset)
    task = {"name": "pets", "hub": {"path": "lab/pets"}, "image": "img", "labels": [0, 1]}
    data = ImageDataModule(task)
    found = look(data, make_trainer)
    assert [example.image for example in sorted(data._examples["test"], key=lambda example: example.id)] == paths
    assert found["label"].tolist() == [id // 10 for id in found["id"]]
