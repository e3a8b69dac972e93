"""RunMonitor: what it logs, when, and that it asks for nothing a module or data module may lack."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, Dataset

from training import Records
from zolightning.callbacks import (
    BlockCoordinateDescent,
    MomentumTransport,
    RunMonitor,
    Spectra,
    SubspaceResampling,
    ZerothOrder,
    run_monitor,
)
from zolightning.callbacks.run_monitor import peak_memory
from zolightning.directions.slices import Slice
from zolightning.optim import LOZO, HiZOO, MeZO, MeZOAdam, SparseMeZO, SubspaceMeZO, ZerothOrderOptimizer

MEZO = partial(MeZO, lr=0.01)


class Recorder(DummyLogger):
    """Keeps what it is given, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.steps.setdefault(step or 0, {}).update(metrics)

    def logged(self, name: str) -> dict[int, float]:
        return {step: metrics[name] for step, metrics in self.steps.items() if name in metrics}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What RunMonitor prints."""
    lines: list[str] = []
    monkeypatch.setattr("zolightning.callbacks.run_monitor.rank_zero_info", lines.append)
    return lines


@pytest.fixture
def fit(
    make_trainer: Callable[..., L.Trainer],
    make_regression: Callable[..., L.LightningModule],
    regression_data: Callable[..., DataLoader],
) -> Callable[..., Recorder]:
    def fit(
        ckpt_path: Path | None = None,
        save_to: Path | None = None,
        method: Callable[..., ZerothOrderOptimizer] = MEZO,
        **kwargs: Any,
    ) -> Recorder:
        recorder = Recorder()
        callbacks = [ZerothOrder(method), RunMonitor()]
        trainer = make_trainer(logger=recorder, callbacks=callbacks, **kwargs)
        trainer.fit(make_regression(), regression_data(), ckpt_path=ckpt_path)
        if save_to is not None:
            trainer.save_checkpoint(save_to)
        return recorder

    return fit


@pytest.mark.parametrize(
    ("method", "names"),
    [
        (partial(HiZOO, lr=0.01, smoothing=0.01), ["curvature_0.01", "curvature_0.5", "curvature_0.99"]),
        (partial(SparseMeZO, lr=0.01), ["share_moving"]),
    ],
)
def test_logs_what_a_method_has_to_show(fit: Callable[..., Recorder], method: Any, names: list[str]) -> None:
    recorder = fit(method=method, max_steps=4, log_every_n_steps=2)
    shown = [recorder.logged(f"method/{name}") for name in names]
    assert [list(values) for values in shown] == [[1, 3]] * len(names)
    values = [values[3] for values in shown]
    assert values == sorted(values) and 0 < values[0] < 1


def test_logs_at_the_trainers_steps(fit: Callable[..., Recorder]) -> None:
    recorder = fit(max_steps=9, log_every_n_steps=3)
    speed, memory = recorder.logged("run/steps_per_second"), recorder.logged("run/peak_memory_gib")
    assert list(speed) == list(memory) == [2, 5, 8]
    assert all(value > 0 for value in speed.values())
    assert memory[8] == pytest.approx(peak_memory(torch.device("cpu")) / 2**30, rel=0.2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_peak_memory_is_not_that_of_the_process_that_started_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    inherited = SimpleNamespace(ru_maxrss=2**40)
    monkeypatch.setattr("resource.getrusage", lambda _: inherited)
    assert 2**20 < peak_memory(torch.device("cpu")) < 2**40


def test_a_system_that_does_not_tell_its_peak_memory(
    fit: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Windows."""
    monkeypatch.setattr("zolightning.callbacks.run_monitor.process_memory", lambda _: None)
    monkeypatch.setitem(sys.modules, "resource", None)
    recorder = fit(max_steps=3, log_every_n_steps=3)
    assert list(recorder.logged("run/steps_per_second")) == [2] and not recorder.logged("run/peak_memory_gib")


def test_no_number_has_to_go_to_the_device(
    make_trainer: Callable[..., L.Trainer],
    make_regression: Callable[..., L.LightningModule],
    regression_data: Callable[..., DataLoader],
) -> None:
    """Numbers are logged as tensors of the host: Lightning copies Python's to the device, and waits for it."""
    found: dict[str, set[type]] = {}

    class Listened(type(make_regression())):
        def log(self, name: str, value: Any, **options: Any) -> None:
            found.setdefault(name, set()).add(type(value))
            super().log(name, value, **options)

    method = partial(SubspaceMeZO, lr=0.01, rank=2, momentum=0.9)
    others = [SubspaceResampling(interval=2), MomentumTransport(), Spectra(["net.0.weight"], every_n_steps=2)]
    blocks = BlockCoordinateDescent(interval=2, layers_name="net")
    for callbacks in ([ZerothOrder(method), *others], [ZerothOrder(partial(HiZOO, lr=0.01)), blocks]):
        trainer = make_trainer(callbacks=[*callbacks, RunMonitor()], max_steps=4, log_every_n_steps=2)
        trainer.fit(Listened(), regression_data())
    for name in ("zo/lr", "zo/refresh", "zo/momentum_kept", "run/steps_per_second", "method/curvature_0.5"):
        assert name in found
    assert all(issubclass(kind, torch.Tensor) for kinds in found.values() for kind in kinds)


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable")
def test_logs_after_resuming_between_two_log_steps(fit: Callable[..., Recorder], tmp_path: Path) -> None:
    fit(max_steps=5, log_every_n_steps=3, save_to=tmp_path / "five.ckpt")
    recorder = fit(tmp_path / "five.ckpt", max_steps=12, log_every_n_steps=3)
    assert list(recorder.logged("run/steps_per_second")) == [5, 8, 11]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What RunMonitor takes for the time: seconds by what took them."""
    seconds = {"training": 0.0, "loading": 0.0, "validation": 0.0}
    monkeypatch.setattr(run_monitor, "time", SimpleNamespace(perf_counter=lambda: sum(seconds.values())))
    return seconds


@pytest.fixture
def slow(make_regression: Callable[..., L.LightningModule], clock: dict[str, float]) -> L.LightningModule:
    """A module whose steps and validations take time."""

    class Slow(type(make_regression())):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            clock["training"] += 0.01
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            clock["validation"] += 0.5

    return Slow()


def test_speed_leaves_out_validation(
    make_trainer: Callable[..., L.Trainer],
    slow: L.LightningModule,
    clock: dict[str, float],
    regression_data: Callable[..., DataLoader],
) -> None:
    recorder = Recorder()
    trainer = make_trainer(
        logger=recorder,
        callbacks=[ZerothOrder(partial(MeZO, lr=0.01)), RunMonitor()],
        max_steps=4,
        log_every_n_steps=4,
        val_check_interval=2,
        num_sanity_val_steps=0,
    )
    trainer.fit(slow, regression_data(), regression_data(num_batches=1))
    assert clock["validation"] == 1.0
    assert recorder.logged("run/steps_per_second")[3] == pytest.approx(4 / clock["training"])


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_speed_has_the_loading_and_all_batches_of_a_step(
    make_trainer: Callable[..., L.Trainer],
    slow: L.LightningModule,
    clock: dict[str, float],
    regression_data: Callable[..., DataLoader],
) -> None:
    """By backpropagation, with gradients of two batches a step."""

    class SlowData(Dataset[Any]):
        rows = regression_data().dataset

        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> Any:
            clock["loading"] += 0.25
            return self.rows[index]

    recorder = Recorder()
    trainer = make_trainer(
        logger=recorder, callbacks=[RunMonitor()], max_steps=8, log_every_n_steps=4, accumulate_grad_batches=2
    )
    trainer.fit(slow, DataLoader(SlowData(), batch_size=1))
    assert list(recorder.logged("run/steps_per_second")) == [3, 7]
    assert recorder.logged("run/steps_per_second")[7] == pytest.approx(1 / (2 * 0.26), rel=0.15)  # one is loaded ahead


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_speed_leaves_out_steps_of_a_ledger(
    make_trainer: Callable[..., L.Trainer],
    slow: L.LightningModule,
    clock: dict[str, float],
    regression_data: Callable[..., DataLoader],
) -> None:
    """They take no evaluation."""
    earlier = Records()

    class Expect(Callback):
        def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.optimizers[0].expect(earlier.records)

    make_trainer(callbacks=[ZerothOrder(MEZO), earlier], max_steps=4).fit(slow, regression_data())
    clock["training"], recorder = 0.0, Recorder()
    trainer = make_trainer(
        logger=recorder, callbacks=[Expect(), ZerothOrder(MEZO), RunMonitor()], max_steps=6, log_every_n_steps=6
    )
    trainer.fit(slow, regression_data())
    assert recorder.logged("run/steps_per_second")[5] == pytest.approx(2 / clock["training"])


@pytest.mark.parametrize(("method", "state"), [(partial(MeZO, lr=0.01), "0.0"), (partial(MeZOAdam, lr=0.01), "2.1")])
def test_says_the_memory_of_the_state_once(
    method: Any,
    state: str,
    make_trainer: Callable[..., L.Trainer],
    regression_data: Callable[..., DataLoader],
    make_regression: Callable[..., L.LightningModule],
    said: list[str],
) -> None:
    module = make_regression()
    module.net[2] = torch.nn.Identity()
    module.net[0], module.net[3] = torch.nn.Linear(4, 2**18 - 1), torch.nn.Linear(2**18 - 1, 1)
    module.net[0].requires_grad_(False)  # its weights are not counted
    trainer = make_trainer(callbacks=[ZerothOrder(method), RunMonitor()], max_steps=2)
    trainer.fit(module, regression_data())
    name = method.func.__name__
    assert said == [f"{name} kept {state} MB of state for 1.0 MB of trainable weights."]


def test_the_state_is_said_when_it_is_whole(
    make_trainer: Callable[..., L.Trainer],
    regression_data: Callable[..., DataLoader],
    make_regression: Callable[..., L.LightningModule],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zolightning.callbacks.run_monitor.in_units", str)
    callbacks = [SubspaceResampling(), ZerothOrder(partial(LOZO, lr=0.01, rank=1)), RunMonitor()]
    trainer = make_trainer(callbacks=callbacks, max_steps=2, precision="bf16-true")
    trainer.fit(make_regression(width=64), regression_data())
    weights, low_words, factor = 385 * 2, 385 * 2, 4 * 2
    assert said == [f"LOZO kept {low_words + factor} of state for {weights} of trainable weights."]


class Sampled(L.LightningDataModule):
    """Has a text to show."""

    def __init__(self, loader: DataLoader) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> DataLoader:
        return self.loader

    def sample_text(self) -> str:
        return "The soup is warm.\nIt was [[ great]]"


def test_shows_a_sample_of_the_data(
    make_trainer: Callable[..., L.Trainer],
    make_regression: Callable[..., L.LightningModule],
    regression_data: Callable[..., DataLoader],
    tmp_path: Path,
) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(logger=logger, callbacks=[RunMonitor()], max_steps=2, log_every_n_steps=1)
    trainer.fit(make_regression(), datamodule=Sampled(regression_data()))
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    (text,) = events.Tensors("prompt/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "    The soup is warm.\n    It was [[ great]]"
    assert len(events.Scalars("run/steps_per_second")) == 2  # also by backpropagation


def test_counts_what_trains_of_a_slice(
    make_trainer: Callable[..., L.Trainer],
    regression_data: Callable[..., DataLoader],
    make_regression: Callable[..., L.LightningModule],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Half(Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.optimizers[0].restrict({pl_module.net[3].weight: Slice(1, torch.arange(2**17))})

    said: list[str] = []
    monkeypatch.setattr("zolightning.callbacks.run_monitor.rank_zero_info", said.append)
    module = make_regression()
    module.net[0], module.net[3] = torch.nn.Linear(4, 2**18), torch.nn.Linear(2**18, 1)
    module.net[0].requires_grad_(False)
    trainer = make_trainer(callbacks=[ZerothOrder(partial(MeZOAdam, lr=0.01)), Half(), RunMonitor()], max_steps=1)
    trainer.fit(module, regression_data())
    assert said == ["MeZOAdam kept 1.0 MB of state for 0.5 MB of trainable weights."]
