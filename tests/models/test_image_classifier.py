"""Image classifiers: their losses are those of transformers, and a new head depends on the seed alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from zolightning.models import ImageClassifier
from zolightning.network.adapters import add_adapter, lora_settings
from zolightning.network.prefix import add_prefix

pytestmark = pytest.mark.skipif(
    "torchvision" in getattr(AutoImageProcessor, "_backends", ()),
    reason="this release of transformers processes images by torchvision alone, which is not installed",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny ViT of three classes for images of 8 x 8."""
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=3,
        initializer_range=0.3,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


class Images(L.LightningDataModule):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes

    def val_dataloader(self) -> DataLoader[Any]:
        batches = [
            {
                "objective": "classification",
                "pixel_values": torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(size)),
                "label": torch.arange(size) % 3,
                "id": torch.arange(size),
            }
            for size in (4, 3)
        ]
        return DataLoader(batches, batch_size=None)


def validate(module: L.LightningModule, data: L.LightningDataModule, **options: Any) -> dict[str, float]:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    (metrics,) = L.Trainer(**quiet, **options).validate(module, data, verbose=False)
    return dict(metrics)


@torch.no_grad()
def test_loss_and_accuracy_are_those_of_transformers(folder: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    loss, right = 0.0, 0
    for batch in Images().val_dataloader():
        output = model(batch["pixel_values"], labels=batch["label"])
        loss += output.loss.item() * len(batch["id"]) / 7
        right += (output.logits.argmax(-1) == batch["label"]).sum().item()
    metrics = validate(ImageClassifier(str(folder)), Images())
    assert metrics["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["val/accuracy"] == pytest.approx(right / 7)
    half = validate(ImageClassifier(str(folder), dtype="bfloat16"), Images())  # of images in float32
    assert half["val/loss"] == pytest.approx(loss, rel=0.1)


def test_a_new_head_depends_on_the_seed_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def head(seed: int, num_classes: int) -> torch.Tensor:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        state = torch.get_rng_state()
        module = ImageClassifier(str(folder), num_classes=num_classes)
        assert torch.equal(state, torch.get_rng_state())
        assert module.model.config.num_labels == num_classes
        return module.model.classifier.weight

    first = head(1, 5)
    torch.rand(3)
    assert first.shape == (5, 16) and torch.equal(head(1, 5), first)
    assert not torch.equal(head(2, 5), first)
    pretrained = AutoModelForImageClassification.from_pretrained(folder).classifier.weight
    assert torch.equal(head(1, 3), pretrained)


def test_a_head_of_other_classes_than_the_task_is_refused(folder: Path) -> None:
    message = r"The head of `model_name` has 3 classes, but the task 5: set `model.num_classes`"
    with pytest.raises(MisconfigurationException, match=message):
        validate(ImageClassifier(str(folder)), Images(num_classes=5))


def test_classes_of_images_are_named_by_their_labels(folder: Path) -> None:
    module = ImageClassifier(str(folder))
    module._name_classes(SimpleNamespace(labels=[3, 7, 9]))
    assert module.model.config.id2label == {0: "3", 1: "7", 2: "9"}


def test_a_network_that_lacks_more_than_a_head_is_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layernorm_before" in name)
    weight = weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the file lacks 1 weights of ViTForImageClassification"):
        ImageClassifier(str(folder), num_classes=5)
    save_file(weights | {name: weight[1:]}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has the shape \(15,\) in the file and \(16,\) in config\.json"):
        ImageClassifier(str(folder), num_classes=5)


def test_without_pillow_a_line_says_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zolightning.data.images.find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match=r"Images need Pillow.*pip install 'zolightning\[images\]'"):
        ImageClassifier(str(folder))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT 0.21 with transformers 5.23
def test_it_starts_from_the_adapter_it_exports_with_its_head(folder: Path) -> None:
    module = ImageClassifier(str(folder), num_classes=2)
    targets = [name for name, part in module.model.named_modules() if isinstance(part, torch.nn.Linear)][:2]
    add_adapter(module.model, lora_settings(2, 4.0, targets))
    for parameter in module.model.parameters():
        torch.nn.init.normal_(parameter)
    module.export(folder / "adapter")
    again = ImageClassifier(str(folder), num_classes=2, adapter=str(folder / "adapter"))
    found = again.model.state_dict()
    trained = {name for name, parameter in again.model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in found if ".lora_" in name} | module.head_parameters.keys()
    assert all(found[name].equal(module.model.state_dict()[name]) for name in trained)


def test_layers_on_the_disk_are_evaluated(folder: Path) -> None:
    parts = [name for name, _ in ImageClassifier(str(folder)).model.vit.named_children()]
    layers = next(name for name in ("layers", "encoder") if name in parts)  # by the version of transformers
    device_map = {f"vit.{name}": "cpu" for name in parts} | {"classifier": "cpu", f"vit.{layers}": "disk"}
    spread = ImageClassifier(str(folder), device_map=device_map)
    assert any(parameter.is_meta for parameter in spread.parameters())
    assert validate(spread, Images()) == validate(ImageClassifier(str(folder)), Images())


def test_an_image_classifier_takes_no_prefix(folder: Path) -> None:
    with pytest.raises(ValueError, match="a decoder attends to, and ViTForImageClassification keeps none"):
        add_prefix(ImageClassifier(str(folder)).model, 4)
