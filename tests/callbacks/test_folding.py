"""Outside a step's evaluations weights are the trained ones, for whoever reads or writes them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from zolightning.callbacks import MomentumTransport, SubspaceResampling, ZerothOrder
from zolightning.callbacks.folding import hook_between_steps
from zolightning.optim import LOZO, ZOMOPI, MeZO, SubspaceOptimizer, SubZero

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13

EPS = 0.05  # wide, so that differences of fp32 losses do not magnify what rounds in another order
METHODS = {
    "mezo": partial(MeZO, lr=0.02, eps=EPS, momentum=0.5),
    "lozo": partial(LOZO, lr=0.05, eps=EPS, rank=2, momentum=0.5),
    "subzero": partial(SubZero, lr=0.05, eps=EPS, rank=3, betas=(0.9, 0.95), vector_lr=0.01),
    "zo-mopi": partial(ZOMOPI, lr=0.05, eps=EPS, rank=3, power_rank=2, vector_lr=0.01),
}
SEED, INTERVAL, BATCHES = 5, 4, 7

Run = Callable[..., L.LightningModule]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Any:
    return partial(METHODS[request.param], seed=SEED)


@pytest.fixture
def run(
    make_trainer: Callable[..., L.Trainer],
    make_regression: Callable[..., L.LightningModule],
    regression_data: Callable[..., DataLoader],
) -> Run:
    """Trains a module, of class `kind`, for two epochs under a Trainer, or on from a checkpoint."""

    def run(method: Any, *callbacks: Callback, kind: type | None = None, ckpt_path: Path | None = None, **kwargs: Any):
        module = (kind or type(make_regression()))()
        needed = [SubspaceResampling(INTERVAL)] if issubclass(method.func, SubspaceOptimizer) else []
        options = {"max_steps": 2 * BATCHES, "num_sanity_val_steps": 0} | kwargs
        trainer = make_trainer(callbacks=[*callbacks, *needed, ZerothOrder(method)], **options)
        data = [StatefulDataLoader(regression_data(BATCHES).dataset, batch_size=4)]
        data += [regression_data(2)] if hasattr(kind, "validated") else []
        trainer.fit(module, *data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return module

    return run


@pytest.fixture
def restated(make_regression: Callable[..., Any], regression_data: Callable[..., DataLoader]) -> Callable[..., Any]:
    """Trains a module in a plain loop, whose weights are the trained ones after every step."""

    def restated(
        method: Any,
        after_step: Callable[[nn.Module, int], None] = lambda module, step: None,
        after_epoch: Callable[[nn.Module], None] = lambda module: None,
    ) -> L.LightningModule:
        module = make_regression().eval()
        optimizer = method(module.parameters())
        optimizer.attach(module)
        for step in range(2 * BATCHES):
            if step and step % INTERVAL == 0 and isinstance(optimizer, SubspaceOptimizer):
                optimizer.resample()
            inputs, targets = list(regression_data(BATCHES))[step % BATCHES]
            optimizer.estimate(lambda i=inputs, t=targets: F.mse_loss(module.net(i), t))
            optimizer.step()
            with torch.no_grad():
                after_step(module, step)
                if step % BATCHES == BATCHES - 1:
                    after_epoch(module)
        return module

    return restated


def assert_close(found: nn.Module, expected: nn.Module) -> None:
    for (name, one), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def with_hooks(base: type, **hooks: Callable[..., Any]) -> type:
    return type("Own", (base,), hooks)


class TestWhoReads:
    @pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
    @pytest.mark.parametrize("by", ["callback", "module"])
    def test_a_forward(
        self, run: Run, restated: Any, method: Any, make_regression: Any, regression_data: Any, hook: str, by: str
    ) -> None:
        inputs = next(iter(regression_data()))[0]
        seen: list[Tensor] = []
        expected: list[Tensor] = []

        def look(module: Any) -> None:
            seen.append(module.net.eval()(inputs))

        if by == "callback":
            looker = type("Looker", (Callback,), {hook: lambda self, trainer, module, *_: look(module)})()
            trained = run(method, looker)
        else:
            trained = run(method, kind=with_hooks(type(make_regression()), **{hook: lambda self, *_: look(self)}))
        where = "after_step" if hook == "on_train_batch_end" else "after_epoch"
        other = restated(method, **{where: lambda module, *_: expected.append(module.net(inputs))})
        torch.testing.assert_close(torch.stack(seen), torch.stack(expected), rtol=1e-4, atol=1e-5)
        assert_close(trained, other)

    def test_an_average(self, run: Run, restated: Any, method: Any, make_regression: Any) -> None:
        """Lightning's own, which also swaps it in for validation, and puts it into the module in the end."""
        average: dict[str, Tensor] = {}
        validated: list[Tensor] = []

        def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                validated.append(self.net[0].weight.clone())

        def update(module: nn.Module, step: int) -> None:
            for name, parameter in module.named_parameters():
                average[name] = parameter.clone() if step == 0 else 0.6 * average[name] + 0.4 * parameter

        kind = with_hooks(type(make_regression()), validation_step=validation_step, validated=True)
        trained = run(method, EMAWeightAveraging(decay=0.6), kind=kind)
        ends: list[Tensor] = []
        restated(method, update, lambda module: ends.append(average["net.0.weight"].clone()))
        for name, parameter in trained.named_parameters():
            torch.testing.assert_close(parameter.detach(), average[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(validated, ends, rtol=1e-4, atol=1e-5)


class TestWhoWrites:
    def test_a_clamp_after_each_batch(self, run: Run, restated: Any, method: Any) -> None:
        class Clamp(Callback):
            def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
                pl_module.net[0].weight.data.clamp_(-0.2, 0.2)

        found = run(method, Clamp())
        assert_close(found, restated(method, lambda module, step: module.net[0].weight.clamp_(-0.2, 0.2)))
        assert found.net[0].weight.abs().max() <= 0.2

    def test_a_fill_before_a_validation(self, run: Run, restated: Any, method: Any, make_regression: Any) -> None:
        validated: list[Tensor] = []

        def fill(self: Any) -> None:
            self.net[0].weight.data.fill_(0.7)

        def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
            validated.append(self.net[0].weight.clone())

        hooks = {"on_validation_epoch_start": fill, "validation_step": validation_step, "validated": True}
        trained = run(method, kind=with_hooks(type(make_regression()), **hooks))
        assert len(validated) == 4 and all(bool((weight == 0.7).all()) for weight in validated)
        assert_close(trained, restated(method, after_epoch=lambda module: module.net[0].weight.fill_(0.7)))


class TestWaiting:
    """Without anybody who looks, updates wait; what comes out is the same up to the rounding of sums."""

    def test_the_same_weights(self, run: Run, restated: Any, method: Any, make_regression: Any) -> None:
        """Which a hook of the module's sees, too, when training ends."""
        seen: list[Tensor] = []
        hook = {"on_train_end": lambda self: seen.append(self.net[0].weight.detach().clone())}
        found = run(method, kind=with_hooks(type(make_regression()), **hook))
        assert_close(found, restated(method))
        assert [torch.equal(weight, found.net[0].weight) for weight in seen] == [True]

    def test_nothing_waits_when_the_strategy_takes_weights_off_their_device(
        self, run: Run, method: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own, waiting = SingleDeviceStrategy.teardown, []

        def teardown(strategy: SingleDeviceStrategy) -> None:
            (optimizer,) = strategy.optimizers
            waiting.append(list(optimizer.pending()) if isinstance(optimizer, SubspaceOptimizer) else [])
            own(strategy)

        monkeypatch.setattr(SingleDeviceStrategy, "teardown", teardown)
        run(method, max_steps=INTERVAL + 1)  # whose last update no resampling has folded
        assert waiting == [[]]

    @pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
    @pytest.mark.parametrize("stop", [3, 4, 6, 9])
    @pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
    def test_stopping_and_resuming(
        self, run: Run, make_regression: Any, tmp_path: Path, precision: str, stop: int
    ) -> None:
        """Within an interval and at its end, before a validation and after one."""

        def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
            self.log("loss", F.mse_loss(self.net(batch[0]).float(), batch[1].float()))

        kind = with_hooks(type(make_regression()), validation_step=validation_step, validated=True)
        options = {"kind": kind, "precision": precision, "enable_checkpointing": True}
        options |= {"check_val_every_n_epoch": None, "val_check_interval": 6}
        method = partial(METHODS["zo-mopi"], seed=SEED)

        def saving(steps: int) -> list[Callback]:
            folder = tmp_path / str(steps)
            checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=steps, save_top_k=-1)
            return [checkpoint, MomentumTransport()]

        alone = run(method, MomentumTransport(), max_steps=12, **options | {"enable_checkpointing": False})
        assert not alone.trainer.optimizers[0].fold_every_step
        whole = run(method, *saving(stop), max_steps=12, **options)
        saved = tmp_path / str(stop) / f"step={stop}.ckpt"
        state = torch.load(saved, weights_only=True)["optimizer_states"][0]["state"]
        assert ("base" in state[0]) is (stop != 6)  # something is pending, but right before a validation
        resumed = run(method, *saving(100), max_steps=12, ckpt_path=saved, **options)
        for one, two, three in zip(alone.parameters(), whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(one, two) and torch.equal(two, three)
        one, two = (module.trainer.optimizers[0].param_groups[0] for module in (whole, resumed))
        assert {**one, "params": 0} == {**two, "params": 0} and one["folds"] > 2


class TestTheChoice:
    @pytest.mark.parametrize(
        "name",
        [
            *("ModelCheckpoint", "LearningRateMonitor", "DeviceStatsMonitor", "Timer", "ModelSummary"),
            *("TQDMProgressBar", "RichProgressBar", "OnExceptionCheckpoint", "Callback"),
        ],
    )
    def test_callbacks_that_leave_weights_alone(self, make_regression: Any, name: str) -> None:
        made = {"OnExceptionCheckpoint": partial(lightning_callbacks.OnExceptionCheckpoint, "folder")}
        callback = made.get(name, getattr(lightning_callbacks, name))()
        ours = [ZerothOrder(METHODS["lozo"]), SubspaceResampling(), MomentumTransport()]
        assert hook_between_steps([callback, *ours], make_regression()) is None

    @pytest.mark.parametrize("name", ["EMAWeightAveraging", "WeightAveraging", "LambdaCallback"])
    def test_callbacks_that_may_look(self, make_regression: Any, name: str) -> None:
        arguments = {"LambdaCallback": {"on_train_batch_end": lambda *_: None}}
        callback = getattr(lightning_callbacks, name)(**arguments.get(name, {}))
        assert hook_between_steps([callback], make_regression()).startswith(f"{name}.on_")

    def test_subclasses_count_by_the_hooks_that_are_their_own(self, make_regression: Any) -> None:
        class Due(SubspaceResampling):
            def is_due(self, *_: Any) -> bool:
                return True

        class Named(ModelCheckpoint):
            def setup(self, *args: Any, **kwargs: Any) -> None:
                super().setup(*args, **kwargs)

        class Looking(ModelCheckpoint):
            def on_validation_start(self, *_: Any) -> None: ...

        assert hook_between_steps([Due(), Named()], make_regression()) is None
        assert hook_between_steps([Due(), Looking()], make_regression()) == "Looking.on_validation_start"

    @pytest.mark.parametrize(
        ("hook", "looks"),
        [
            ("on_train_batch_end", True),
            ("on_train_epoch_end", True),
            ("on_train_start", True),
            ("on_before_optimizer_step", True),
            ("on_after_batch_transfer", True),
            ("on_save_checkpoint", True),
            ("on_validation_start", False),
            ("on_validation_epoch_end", False),
            ("validation_step", False),
            ("on_fit_start", False),
            ("on_fit_end", False),
        ],
    )
    def test_hooks_of_modules(self, make_regression: Any, hook: str, looks: bool) -> None:
        module = with_hooks(type(make_regression()), **{hook: lambda self, *_: None})()
        assert hook_between_steps([], module) == (f"Own.{hook}" if looks else None)

    def test_it_is_said_once(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        said: list[str] = []
        monkeypatch.setattr("zolightning.callbacks.folding.rank_zero_info", said.append)
        run(METHODS["lozo"], max_steps=2)
        assert not said
        run(METHODS["lozo"], EMAWeightAveraging(), max_steps=2)
        assert len(said) == 1 and said[0].startswith(
            "LOZO adds its updates to the weights at every step, because EMAWeightAveraging.on_"
        )
