"""A module that takes its zeroth-order steps itself."""

from collections.abc import Callable
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.nn import functional as F

from tape import Tape
from zolightning import zeroth_order_step
from zolightning.optim import MeZO


class OwnLoop(L.LightningModule):
    """Manual optimization, as a user would write it, with layers that behave differently in training."""

    def __init__(self, make_optimizer: Callable[[Any], Any] = MeZO) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 1))
        self.frozen_norm = nn.BatchNorm1d(4)
        self.make_optimizer = make_optimizer
        self.losses = Tape()
        self.records: list[Any] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Any:
        inputs, targets = batch
        loss = F.mse_loss(self.net(self.frozen_norm(inputs)), targets)
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.records.append(zeroth_order_step(self, lambda: self.loss(batch)))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())
