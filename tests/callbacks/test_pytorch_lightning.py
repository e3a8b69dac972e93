"""``pytorch_lightning`` is the code base of ``lightning.pytorch`` under another name: callbacks work under both."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from training import assert_equal, weights
from zolightning.callbacks import MomentumTransport, RunMonitor, SubspaceResampling, TrainLayers, ZerothOrder
from zolightning.callbacks.refusals import refuse_strategy
from zolightning.optim import MeZO, SubZero

pl = pytest.importorskip("pytorch_lightning")


def make_module(package: Any) -> Any:
    """The same module on the base class of either package."""

    class Regression(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(7)
                self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x.sum(1, keepdim=True)

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = F.mse_loss(self(batch[0]), batch[1])
            self.log("mine", loss)
            return loss

        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            self.log("val/loss", F.mse_loss(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Regression()


def callbacks(kind: str) -> list[L.Callback]:
    if kind == "dense":
        return [ZerothOrder(partial(MeZO, lr=1e-2)), TrainLayers([1]), RunMonitor()]
    method = partial(SubZero, lr=1e-3, rank=2, momentum=0.5)
    return [ZerothOrder(method), SubspaceResampling(3), MomentumTransport()]


@pytest.mark.parametrize("kind", ["dense", "subspace"])
def test_both_packages_train_alike(kind: str, regression_data: Callable[..., DataLoader], tmp_path: Any) -> None:
    modules = []
    for package in (L, pl):
        quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "default_root_dir": tmp_path, "enable_checkpointing": False}
        trainer = package.Trainer(max_steps=8, callbacks=callbacks(kind), **quiet)
        module = make_module(package)
        before = weights(module)
        trainer.fit(module, regression_data(), regression_data(num_batches=1))
        assert trainer.global_step == 8 and module.automatic_optimization
        assert {"train/loss", "val/loss", "mine"} <= set(trainer.callback_metrics)
        assert not torch.equal(before["layers.1.0.weight"], module.layers[1][0].weight)
        modules.append(module)
    assert_equal(*map(weights, modules))


def test_strategies_are_told_apart_by_name() -> None:
    refuse_strategy(pl.strategies.DDPStrategy())
    with pytest.raises(L.pytorch.utilities.exceptions.MisconfigurationException, match="FSDPStrategy, which shards"):
        refuse_strategy(object.__new__(pl.strategies.FSDPStrategy))
