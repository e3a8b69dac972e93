"""What ZerothOrder refuses by name, before the first step."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import BitsandbytesPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from zolightning.callbacks import ZerothOrder
from zolightning.callbacks.zeroth_order import refuse_unsupported
from zolightning.optim import MeZO

MakeTrainer = Callable[..., L.Trainer]
MakeData = Callable[..., DataLoader]
MakeModule = Callable[..., L.LightningModule]


class TestRefusals:
    @staticmethod
    def surroundings(**changed: Any) -> Any:
        plain = {
            "strategy": SingleDeviceStrategy(),
            "precision_plugin": Precision(),
            "accumulate_grad_batches": 1,
            "gradient_clip_val": None,
        }
        return SimpleNamespace(**plain | changed)

    @pytest.mark.parametrize("strategy", [SingleDeviceStrategy(), DDPStrategy()])
    def test_what_is_supported(self, strategy: Any) -> None:
        refuse_unsupported(self.surroundings(strategy=strategy))

    @pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
    def test_strategies_that_shard(self, strategy: type) -> None:
        made = object.__new__(strategy)  # whose packages and devices are not here
        with pytest.raises(
            MisconfigurationException, match=f"`trainer.strategy` is {strategy.__name__}.*'auto' or 'ddp'"
        ):
            refuse_unsupported(self.surroundings(strategy=made))

    def test_scaled_gradients(self) -> None:
        # By hand: on a CPU, the Trainer silently takes bf16-mixed for it
        plugin = MixedPrecision("16-mixed", "cpu")
        with pytest.raises(MisconfigurationException, match=r"`trainer.precision` is '16-mixed'.*'bf16-mixed'"):
            refuse_unsupported(self.surroundings(precision_plugin=plugin))

    def test_other_precisions(self) -> None:
        plugin = object.__new__(BitsandbytesPrecision)
        plugin.precision = "nf4"
        with pytest.raises(MisconfigurationException, match=r"`trainer.precision` is 'nf4', which is not supported"):
            refuse_unsupported(self.surroundings(precision_plugin=plugin))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"accumulate_grad_batches": 4}, "`trainer.accumulate_grad_batches` is 4.*`micro_batch_size`"),
            ({"gradient_clip_val": 0.5}, "`trainer.gradient_clip_val` is 0.5.*`clip`"),
        ],
    )
    def test_options_of_the_trainer(
        self,
        make_regression: MakeModule,
        regression_data: MakeData,
        make_trainer: MakeTrainer,
        options: dict[str, Any],
        message: str,
    ) -> None:
        trainer = make_trainer(max_steps=1, callbacks=[ZerothOrder(MeZO)], **options)
        with pytest.raises(MisconfigurationException, match=message):
            trainer.fit(make_regression(), regression_data())

    @pytest.mark.parametrize(
        ("callback", "message"),
        [
            (ZerothOrder(partial(torch.optim.SGD, lr=0.1)), "`method` must make a zeroth-order optimizer.*got SGD"),
            (
                ZerothOrder(MeZO, lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau),
                "`lr_scheduler` is ReduceLROnPlateau, which waits for a metric",
            ),
        ],
    )
    def test_methods_and_schedulers(
        self,
        make_regression: MakeModule,
        regression_data: MakeData,
        make_trainer: MakeTrainer,
        callback: ZerothOrder,
        message: str,
    ) -> None:
        with pytest.raises(MisconfigurationException, match=message):
            make_trainer(max_steps=1, callbacks=[callback]).fit(make_regression(), regression_data())

    def test_nothing_to_train(
        self, make_regression: MakeModule, regression_data: MakeData, make_trainer: MakeTrainer
    ) -> None:
        module = make_regression().requires_grad_(False)
        with pytest.raises(MisconfigurationException, match="No parameter is trainable"):
            make_trainer(max_steps=1, callbacks=[ZerothOrder(MeZO)]).fit(module, regression_data())
