"""The LightningModule that fine-tunes an image classifier, such as a ViT."""

from typing import Any

from torch import Tensor

from zolightning.data.images import ImageBatch, require_pillow
from zolightning.models.classifier import Classifier


class ImageClassifier(Classifier):
    """A pretrained network that classifies images, such as a ViT, trained by the cross-entropy.

    With an `adapter` to start from, the head trains too.

    Example::

        model = ImageClassifier("google/vit-base-patch16-224-in21k", num_classes=2)
        data = ImageDataModule({"name": "pets", "image": "image", "labels": ["cat", "dog"]}, path="pets")
        Trainer(max_steps=1000).fit(model, datamodule=data)
    """

    network_class = "AutoModelForImageClassification"
    preprocessor_class = "AutoImageProcessor"

    def __init__(self, *args: Any, **settings: Any) -> None:
        require_pillow()
        super().__init__(*args, **settings)

    def logits(self, batch: ImageBatch) -> Tensor:
        return self.model(pixel_values=batch["pixel_values"].to(self.model.dtype)).logits
