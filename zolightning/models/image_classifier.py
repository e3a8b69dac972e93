"""The LightningModule that fine-tunes an image classifier, such as a ViT."""

from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from zolightning.data.images import ImageBatch, require_pillow
from zolightning.models.classifier import Classifier
from zolightning.quantization import Quantization


class ImageClassifier(Classifier):
    """A pretrained network that says which class an image is of, such as a ViT, trained by the cross-entropy.

    Args:
        model_name: An id on the Hugging Face hub, or a folder in Hugging Face's format.
        num_classes: How many classes there are. Where the model has another number, its head is a new one, whose
            weights depend on `seed_everything`. Default: those that the model has.
        optimizer: Makes the first-order optimizer from the parameters.
        lr_scheduler: Makes a learning rate scheduler from the optimizer. It is stepped after every batch.
        dtype: The dtype in which the weights are loaded. Default: float32, which the Trainer's `precision` may
            convert.
        attention: Hugging Face's attention implementation, such as sdpa or eager. Default: sdpa where the architecture
            supports it, otherwise eager.
        quantization: Stores the weights of linear maps in 8 bits (int8) or about 4 (nf4, which needs bitsandbytes);
            they are frozen, and unpacked one map at a time. What a scope trains is left as it is. Default: none.

    Example::

        model = ImageClassifier("google/vit-base-patch16-224-in21k", num_classes=2)
        data = ImageDataModule({"name": "pets", "labels": ["cat", "dog"]}, path="pets")
        Trainer(max_steps=1000).fit(model, datamodule=data)
    """

    network_class = "AutoModelForImageClassification"
    preprocessor_class = "AutoImageProcessor"

    def __init__(
        self,
        model_name: str,
        num_classes: int | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-5),
        lr_scheduler: LRSchedulerCallable | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        attention: str | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        require_pillow()
        super().__init__(model_name, optimizer, lr_scheduler, dtype, attention, quantization, num_classes)

    def logits(self, batch: ImageBatch) -> Tensor:
        return self.model(pixel_values=batch["pixel_values"].to(self.model.dtype)).logits
