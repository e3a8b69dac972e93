"""What ZerothOrder refuses by name, before the first step."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.plugins import BitsandbytesPrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

from zolightning.callbacks import ZerothOrder
from zolightning.callbacks.refusals import made_scheduler, refuse_strategy, refuse_unsupported
from zolightning.optim import LOZO, MeZO, SubZero
from zolightning.strategies import ZerothOrderFSDP

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
            "callbacks": [],
        }
        return SimpleNamespace(**plain | changed)

    @pytest.mark.parametrize(
        "strategy",
        [
            SingleDeviceStrategy(),
            DDPStrategy(),
            type("Mine", (SingleDeviceStrategy,), {})(),
            type("MineToo", (DDPStrategy,), {})(),
        ],
        ids=lambda strategy: type(strategy).__name__,
    )
    def test_what_is_supported(self, strategy: Any) -> None:
        refuse_unsupported(self.surroundings(strategy=strategy))

    @pytest.mark.parametrize("name", ["fsdp", "fsdp_cpu_offload", "deepspeed_stage_2", "model_parallel", "xla"])
    def test_names_of_strategies(self, name: str) -> None:
        with pytest.raises(
            MisconfigurationException, match=f"`trainer.strategy` is '{name}', which .*'auto', 'ddp' or 'zo_ddp'"
        ):
            refuse_strategy(name)
        refuse_strategy("ddp_spawn"), refuse_strategy("auto"), refuse_strategy("zo_ddp"), refuse_strategy("zo_fsdp")

    def test_a_strategy_of_ones_own_from_scratch(self) -> None:
        class Odd(ParallelStrategy): ...

        Odd.__abstractmethods__ = frozenset()
        made = object.__new__(Odd)
        with pytest.raises(MisconfigurationException, match=r"is Odd, but .* derived from SingleDeviceStrategy or DDP"):
            refuse_unsupported(self.surroundings(strategy=made))

    @pytest.mark.parametrize(
        "strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, type("MyFSDP", (FSDPStrategy,), {})]
    )
    def test_strategies_that_shard(self, strategy: type) -> None:
        made = object.__new__(strategy)  # whose packages and devices are not here
        with pytest.raises(
            MisconfigurationException, match=f"`trainer.strategy` is {strategy.__name__}.*'auto', 'ddp' or 'zo_ddp'"
        ):
            refuse_unsupported(self.surroundings(strategy=made))

    @pytest.mark.parametrize(
        "option",
        [{"micro_batch_size": 2}, {"evaluations_per_forward": 2}, {"keep_prefix_gib": 1.0}],
        ids=lambda option: next(iter(option)),
    )
    def test_other_forwards_than_those_of_other_ranks(self, option: dict[str, Any]) -> None:
        strategy = ZerothOrderFSDP()
        refuse_unsupported(self.surroundings(strategy=strategy, callbacks=[ZerothOrder(MeZO)]))
        ((name, value),) = option.items()
        with pytest.raises(MisconfigurationException, match=f"`{name}` is {value}, but under 'zo_fsdp' .*'zo_ddp'"):
            refuse_unsupported(self.surroundings(strategy=strategy, callbacks=[ZerothOrder(MeZO, **option)]))

    def test_averages_of_shards(self) -> None:
        callbacks = [ZerothOrder(MeZO), EMAWeightAveraging()]
        refuse_unsupported(self.surroundings(strategy=DDPStrategy(), callbacks=callbacks))
        with pytest.raises(MisconfigurationException, match=r"has a EMAWeightAveraging, which averages .*'zo_ddp'"):
            refuse_unsupported(self.surroundings(strategy=ZerothOrderFSDP(), callbacks=callbacks))

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

    @pytest.mark.parametrize("plugin", [HalfPrecision("bf16-true"), type("Mine", (Precision,), {})()])
    def test_precisions_that_work(self, plugin: Precision) -> None:
        refuse_unsupported(self.surroundings(precision_plugin=plugin))

    def test_no_clipping_is_none_or_zero(self) -> None:
        refuse_unsupported(self.surroundings(gradient_clip_val=0))

    def test_two_methods(self) -> None:
        made = [ZerothOrder(MeZO), type("Mine", (ZerothOrder,), {})(MeZO)]
        with pytest.raises(
            MisconfigurationException, match="has 2 ZerothOrder callbacks, but a run has only one method"
        ):
            refuse_unsupported(self.surroundings(callbacks=made))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"accumulate_grad_batches": 2}, "`trainer.accumulate_grad_batches` is 2.*`micro_batch_size`"),
            ({"gradient_clip_val": 0.5}, "`trainer.gradient_clip_val` is 0.5.*`clip`"),
            (
                {"callbacks": [ZerothOrder(MeZO), GradientAccumulationScheduler({3: 2})]},
                "GradientAccumulationScheduler, .*`micro_batch_size`",
            ),
            (
                {"callbacks": [ZerothOrder(MeZO), StochasticWeightAveraging(1e-3)]},
                "StochasticWeightAveraging, .*EMAWeightAveraging",
            ),
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
        trainer = make_trainer(**{"max_steps": 1, "callbacks": [ZerothOrder(MeZO)]} | options)
        with pytest.raises(MisconfigurationException, match=message):
            trainer.fit(make_regression(), regression_data())

    def test_a_method_that_is_made_already(self) -> None:
        with pytest.raises(ValueError, match=r"as partial\(MeZO, lr=1e-6\) does, got an object of MeZO"):
            ZerothOrder(MeZO([torch.nn.Parameter(torch.ones(2))], lr=0.1))  # type: ignore[arg-type]  # not by the type

    @pytest.mark.parametrize(
        ("callback", "message"),
        [
            (ZerothOrder(partial(torch.optim.SGD, lr=0.1)), "`method` must make a zeroth-order optimizer.*got SGD"),
            (
                ZerothOrder(MeZO, lr_scheduler=ReduceLROnPlateau),
                "`lr_scheduler` is ReduceLROnPlateau, which needs a metric",
            ),
            (
                ZerothOrder(MeZO, lr_scheduler=partial(OneCycleLR, max_lr=1e-3, total_steps=9)),
                "`lr_scheduler` is OneCycleLR, which has set `momentum` to 0.95, but .*`cycle_momentum=False`",
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

    def test_a_scheduler_of_moments_that_a_method_has_not(self) -> None:
        make, method = partial(OneCycleLR, max_lr=1e-3, total_steps=9), SubZero([torch.nn.Parameter(torch.ones(3, 3))])
        assert made_scheduler(partial(make, cycle_momentum=False), method).optimizer is method
        with pytest.raises(MisconfigurationException, match=r"set `momentum` to 0.95, .*SubZero .*`momentum`"):
            made_scheduler(make, method)
        made_scheduler(make, moving := LOZO([torch.nn.Parameter(torch.ones(3, 3))], momentum=0.9))
        assert moving.param_groups[0]["momentum"] == 0.95  # the cycle's
        with pytest.raises(TypeError, match="max_rate"):
            made_scheduler(partial(OneCycleLR, max_rate=1), method)

    def test_nothing_to_train(
        self, make_regression: MakeModule, regression_data: MakeData, make_trainer: MakeTrainer
    ) -> None:
        module = make_regression().requires_grad_(False)
        with pytest.raises(MisconfigurationException, match="No parameter is trainable"):
            make_trainer(max_steps=1, callbacks=[ZerothOrder(MeZO)]).fit(module, regression_data())
