"""Stopping and resuming equals not stopping, bit for bit."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from optimizer_steps import METHODS_AND_DTYPES
from zolightning.callbacks import MomentumTransport, SubspaceResampling, ZerothOrder
from zolightning.optim import LOZO, ZOMOPI, MeZO, StepRecord, SubZero, WarmupDecay, ZerothOrderOptimizer
from zolightning.optim.estimators import ForwardGradient, PerExample
from zolightning.optim.subspace import SubspaceOptimizer

Method = Callable[..., ZerothOrderOptimizer]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`update_precision` is 'native'"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata 0.11 with torch 2.13
]

PRECISIONS = {torch.float32: "32-true", torch.bfloat16: "bf16-true", torch.float16: "16-true"}


class Recorder(Callback):
    """Keeps the records of a run, and saves a checkpoint when `stop` steps are done."""

    def __init__(self, stop: int | None, path: Path) -> None:
        self.records: list[StepRecord] = []
        self.stop, self.path = stop, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.records.append(trainer.optimizers[0].record)
        if trainer.global_step == self.stop:
            trainer.save_checkpoint(self.path)


@dataclass
class Run:
    """What is left of a run."""

    trainer: L.Trainer
    module: L.LightningModule
    records: list[StepRecord]

    def assert_ends_as(self, other: "Run") -> None:
        for (name, one), two in zip(self.module.named_parameters(), other.module.parameters(), strict=True):
            integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
            assert one.dtype == two.dtype and torch.equal(one.data.view(integer), two.data.view(integer)), name
        one, two = (run.trainer.optimizers[0].state_dict() for run in (self, other))
        assert one["param_groups"] == two["param_groups"]
        for index, entries in two["state"].items():
            for name, value in entries.items():
                twin = one["state"][index][name]
                if isinstance(value, Tensor):
                    assert value.dtype == twin.dtype and torch.equal(value, twin), name
                else:
                    assert value == twin
        assert self.trainer.global_step == other.trainer.global_step


@pytest.fixture
def run(
    make_trainer: Callable[..., L.Trainer],
    make_regression: Callable[..., L.LightningModule],
    regression_data: Callable[..., DataLoader],
    tmp_path: Path,
) -> Callable[..., Run]:
    """Runs a fresh module and optimizer to the end, saving `saved.ckpt` after `stop` steps or resuming from a file."""

    def run(
        method: Method, stop: int | None = None, ckpt_path: Path | None = None, max_steps: int = 20, **kwargs: Any
    ) -> Run:
        L.seed_everything(5 if ckpt_path is None else 6, verbose=False)
        schedule = partial(WarmupDecay, final=0.1)
        recorder = Recorder(stop, tmp_path / "saved.ckpt")
        resampling = [SubspaceResampling(interval=4)] if issubclass(method.func, SubspaceOptimizer) else []
        own = kwargs.pop("callbacks", resampling)
        callbacks = [ZerothOrder(method, lr_scheduler=schedule), recorder, *own]
        module, trainer = make_regression(), make_trainer(max_steps=max_steps, callbacks=callbacks, **kwargs)
        if ckpt_path is not None:
            for parameter in module.parameters():  # all of it has to come from the checkpoint
                nn.init.constant_(parameter, 0.1)
        # A resumed epoch goes on with the batch that comes next only if the loader can be restored
        data = StatefulDataLoader(regression_data().dataset, batch_size=4)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return Run(trainer, module, recorder.records)

    return run


@METHODS_AND_DTYPES
def test_every_method(method: Method, run: Callable[..., Run], tmp_path: Path, dtype: torch.dtype) -> None:
    """Between two resamplings, in mid-epoch; the next of both come after it."""
    settings = {"max_steps": 12, "precision": PRECISIONS[dtype]}
    whole = run(method, stop=6, **settings)
    resumed = run(method, ckpt_path=tmp_path / "saved.ckpt", **settings)
    assert len(whole.records) == 12 and resumed.records == whole.records[6:]
    resumed.assert_ends_as(whole)
    assert {parameter.dtype for parameter in resumed.module.parameters()} == {dtype}
    assert len({record.lr for record in whole.records}) == 12, "the schedule has no effect"


def test_float64_of_a_module_built_in_float32(run: Callable[..., Run], tmp_path: Path) -> None:
    method = partial(MeZO, lr=1e-2, momentum=0.9)
    whole = run(method, stop=10, precision="64-true")
    resumed = run(method, ckpt_path=tmp_path / "saved.ckpt", precision="64-true")
    assert resumed.records == whole.records[10:]
    resumed.assert_ends_as(whole)


@pytest.mark.parametrize("stop", [1, 6, 7, 8, 19])
def test_any_step(run: Callable[..., Run], tmp_path: Path, stop: int) -> None:
    """First and last of an epoch of 7 batches among them."""
    method = partial(MeZO, lr=1e-2, normalize=True, clip=2.0)
    whole = run(method, stop=stop)
    resumed = run(method, ckpt_path=tmp_path / "saved.ckpt")
    assert resumed.records == whole.records[stop:]
    resumed.assert_ends_as(whole)


def test_a_direction_for_each_example(run: Callable[..., Run], tmp_path: Path) -> None:
    options = {"estimator": PerExample(), "num_queries": 4, "normalize": True, "clip": 3.0}
    method = partial(LOZO, lr=0.01, rank=2, momentum=0.5, **options)
    whole = run(method, stop=6, precision="bf16-true")
    resumed = run(method, ckpt_path=tmp_path / "saved.ckpt", precision="bf16-true")
    assert [len(record.projected_grads) for record in whole.records] == [4] * 20
    assert resumed.records == whole.records[6:]
    resumed.assert_ends_as(whole)


def test_derivatives_in_the_place_of_differences(run: Callable[..., Run], tmp_path: Path) -> None:
    method = partial(MeZO, lr=0.01, momentum=0.5, estimator=ForwardGradient(), num_queries=2)
    whole = run(method, stop=6, precision="bf16-true")
    resumed = run(method, ckpt_path=tmp_path / "saved.ckpt", precision="bf16-true")
    assert resumed.records == whole.records[6:]
    resumed.assert_ends_as(whole)


ZO_MOPI = partial(ZOMOPI, lr=0.05, rank=3, power_rank=2, vector_lr=0.01)


@pytest.mark.parametrize("stop", [4, 5, 7])
@pytest.mark.parametrize(
    ("method", "transport", "anchor"),
    [
        (ZO_MOPI, "project", 0),
        (ZO_MOPI, "project", 1),
        (ZO_MOPI, "keep", 2),
        (ZO_MOPI, "reset", 1),
        (partial(LOZO, lr=0.05, rank=2, momentum=0.8), "project", 1),
        (partial(SubZero, lr=0.02, rank=3, betas=(0.9, 0.95)), "project", 1),
        (partial(SubZero, lr=0.02, rank=3, betas=(0.9, 0.95)), "reset", 0),
    ],
)
def test_any_step_of_an_interval_with_any_transport(
    run: Callable[..., Run], tmp_path: Path, method: Method, transport: str, anchor: int, stop: int
) -> None:
    """Right before and right after new bases are drawn, and in between."""

    def callbacks() -> list[Callback]:
        return [SubspaceResampling(interval=4, anchor=anchor), MomentumTransport(transport)]

    whole = run(method, stop=stop, callbacks=callbacks(), precision="bf16-true")
    resumed = run(method, ckpt_path=tmp_path / "saved.ckpt", callbacks=callbacks(), precision="bf16-true")
    assert [record.refresh for record in whole.records] == [step // 4 for step in range(20)]
    assert resumed.records == whole.records[stop:]
    resumed.assert_ends_as(whole)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
def test_a_checkpoint_of_model_checkpoint(run: Callable[..., Run], tmp_path: Path) -> None:
    method = partial(MeZO, lr=1e-2, momentum=0.9)
    checkpoint = ModelCheckpoint(tmp_path / "epochs", filename="{step}", save_top_k=-1)
    whole = run(method, enable_checkpointing=True, callbacks=[checkpoint])
    assert {"step=7.ckpt", "step=14.ckpt"} <= {path.name for path in (tmp_path / "epochs").iterdir()}
    resumed = run(method, ckpt_path=tmp_path / "epochs" / "step=7.ckpt")
    assert resumed.records == whole.records[7:]
    resumed.assert_ends_as(whole)


def test_from_a_checkpoint_that_an_error_left(
    run: Callable[..., Run],
    make_regression: Callable[..., L.LightningModule],
    make_trainer: Callable[..., L.Trainer],
    regression_data: Callable[..., DataLoader],
    tmp_path: Path,
) -> None:
    """Written in the middle of a step: with the weights of the last complete one."""
    method = partial(MeZO, lr=1e-2, momentum=0.9)
    whole = run(method)

    L.seed_everything(5, verbose=False)
    module, calls = make_regression(), []
    own_step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Tensor:
        calls.append(batch_idx)
        if len(calls) == 5 + 2 * 7 + 1:  # audit, seven steps, and one evaluation of the eighth
            raise KeyboardInterrupt
        return own_step(batch, batch_idx)

    module.training_step = training_step
    schedule = partial(WarmupDecay, final=0.1)
    callbacks = [ZerothOrder(method, lr_scheduler=schedule)]
    trainer = make_trainer(max_steps=20, callbacks=callbacks)

    class SaveOnException(Callback):
        def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "interrupted.ckpt")

    trainer.callbacks.append(SaveOnException())
    with pytest.raises(SystemExit):
        trainer.fit(module, regression_data())
    checkpoint = torch.load(tmp_path / "interrupted.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 7

    optimizer = method(make_regression().named_parameters())
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    restored = make_regression()
    restored.load_state_dict(checkpoint["state_dict"])
    replayed = make_regression()
    replayer = method(replayed.named_parameters())
    for record in whole.records[:7]:
        replayer.apply(record)
    for one, other in zip(restored.parameters(), replayed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert optimizer.param_groups[0]["step"] == 7
