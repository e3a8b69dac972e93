"""What a run under a Trainer leaves: its records, a checkpoint, the weights, and which of them moved."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from zolightning.callbacks import ZerothOrder
from zolightning.optim import MeZO, StepRecord


class Records(Callback):
    """Keeps the record of every step."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.records.append(trainer.optimizers[0].record)


class Save(Callback):
    """Saves a checkpoint when `stop` steps are done."""

    def __init__(self, stop: int, path: Path) -> None:
        self.stop, self.path = stop, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.stop:
            trainer.save_checkpoint(self.path)


def zeroth_order(method: Callable[..., Any] | None = None) -> ZerothOrder:
    return ZerothOrder(method or partial(MeZO, lr=1e-2))


def num_trained(trainer: L.Trainer) -> int:
    """How many numbers a Trainer's method moves."""
    (method,) = trainer.optimizers
    return sum(math.prod(method.trainable_shape(parameter)) for _, _, parameter in method.trainable())


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def moved(before: dict[str, Tensor], module: L.LightningModule) -> dict[str, int]:
    """How many numbers of each parameter are other ones than before; parameters without any are left out."""
    counts = {name: int((p != before[name]).sum()) for name, p in module.named_parameters()}
    return {name: count for name, count in counts.items() if count}


def sizes(module: L.LightningModule, prefix: str) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in module.named_parameters() if name.startswith(prefix)}
