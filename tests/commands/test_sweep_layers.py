"""A sweep over layers: what each layer's run is, how a sweep goes on, and what it refuses."""

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from zolightning.callbacks import DominantLayer, TrainLayers, ZerothOrder
from zolightning.commands.trainer import Trainer
from zolightning.optim import MeZO

Row = dict[str, str]


def rows(folder: Path) -> dict[str, Row]:
    with (folder / "results.csv").open() as file:
        return {row["layer"]: row for row in csv.DictReader(file)}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + torch.tanh(self.dropout(self.linear(inputs)))


class Stack(L.LightningModule):
    """A regression by three layers, with dropout, that keeps what it saw and with which weights."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)
        self.starts: list[dict[str, Tensor]] = []
        self.batches: list[list[Tensor]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = layer(inputs)
        return inputs.sum(dim=1)

    def tensors(self) -> dict[str, Tensor]:
        return self.state_dict() | dict(self.named_buffers())

    def on_train_start(self) -> None:
        self.starts.append({name: tensor.clone() for name, tensor in self.tensors().items()})
        self.batches.append([])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        if not self.batches[-1] or not torch.equal(self.batches[-1][-1], targets):
            self.batches[-1].append(targets)
        self.seen += 1
        self.unsaved += 1
        return F.mse_loss(self(inputs), targets)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", F.mse_loss(self(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test/loss", F.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Numbers(L.LightningDataModule):
    """Shuffled by torch's global generator."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(24, 4, generator=generator)
        self.data = TensorDataset(inputs, inputs.sum(dim=1) * 2)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=4, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=24)

    test_dataloader = val_dataloader


class Stop(Callback):
    """Ends the process, so to speak, in the middle of the given fit."""

    def __init__(self, fit: int) -> None:
        self.fit, self.fits, self.steps = fit, 0, 0

    def on_train_start(self, *_: Any) -> None:
        self.fits += 1

    def on_train_batch_start(self, *_: Any) -> None:
        if self.fits == self.fit:
            raise RuntimeError("killed")

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., Stack]:
    """Runs a sweep of a new module and returns the module."""

    def run(*callbacks: Callback, lr: float = 1e-2, module: Stack | None = None, **arguments: Any) -> Stack:
        module = Stack() if module is None else module
        method = ZerothOrder(partial(MeZO, lr=lr, seed=5))
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
            callbacks=[*([] if arguments.get("first_order") else [method]), *callbacks],
        )
        torch.manual_seed(0)
        trainer.sweep_layers(module, Numbers(), **{"steps": 7, "output": str(tmp_path / "sweep")} | arguments)
        return module

    return run


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_each_layer_starts_from_the_same_weights_and_batches(
    sweep: Callable[..., Stack], tmp_path: Path, first_order: bool
) -> None:
    module = sweep(first_order=first_order)
    pretrained = Stack().tensors()
    assert len(module.starts) == 3 and len(module.batches) == 3
    for weights, batches in zip(module.starts, module.batches, strict=True):
        torch.testing.assert_close(weights, pretrained, rtol=0, atol=0)  # buffers included
        assert len(batches) == 7
        torch.testing.assert_close(batches, module.batches[0], rtol=0, atol=0)
    torch.testing.assert_close(module.tensors(), pretrained, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in module.parameters())

    found = rows(tmp_path / "sweep")
    assert list(found) == ["zero-shot", "0", "1", "2"]
    assert {row["steps"] for layer, row in found.items() if layer != "zero-shot"} == {"7"}
    assert found["1"]["parameters"] == "20"
    losses = [float(row["val/loss"]) for row in found.values()]
    assert len(set(losses)) == 4
    if first_order:
        assert all(loss < losses[0] for loss in losses[1:])


def test_a_row_is_what_a_run_of_its_own_gives(
    sweep: Callable[..., Stack], tmp_path: Path, make_trainer: Callable[..., L.Trainer]
) -> None:
    sweep()
    module, data = Stack(), Numbers()
    method = ZerothOrder(partial(MeZO, lr=1e-2, seed=5))
    trainer = make_trainer(max_steps=7, max_epochs=-1, limit_val_batches=0, callbacks=[method, TrainLayers([2])])
    torch.manual_seed(0)
    trainer.fit(module, data)
    (metrics,) = make_trainer().validate(module, data, verbose=False)
    assert float(rows(tmp_path / "sweep")["2"]["val/loss"]) == metrics["val/loss"]
    changed = {n for n, p in module.named_parameters() if not torch.equal(p, Stack().state_dict()[n])}
    assert changed == {"layers.2.linear.weight", "layers.2.linear.bias"}


def test_an_interrupted_sweep_goes_on(sweep: Callable[..., Stack], tmp_path: Path) -> None:
    sweep(output=str(tmp_path / "whole"))
    stop = Stop(fit=2)
    module = Stack()
    with pytest.raises(RuntimeError, match="killed"):
        sweep(stop, module=module)
    torch.testing.assert_close(module.state_dict(), Stack().state_dict(), rtol=0, atol=0)
    assert stop.steps == 7 and list(rows(tmp_path / "sweep")) == ["zero-shot", "0"]

    count = Stop(fit=-1)
    sweep(count)
    assert count.steps == 2 * 7  # the two layers that were missing
    once = Stop(fit=-1)
    sweep(once)
    assert once.steps == 0

    def without_time(folder: str) -> list[Row]:
        return [row | {"seconds": ""} for row in rows(tmp_path / folder).values()]

    assert without_time("sweep") == without_time("whole")


def test_layers_can_be_added_later(sweep: Callable[..., Stack], tmp_path: Path, capsys: Any) -> None:
    sweep(layers=[2])
    sweep(layers=[0, 2, 0])
    found = rows(tmp_path / "sweep")
    assert list(found) == ["zero-shot", "2", "0"]  # the order in which they came
    table = capsys.readouterr().out.rpartition("each layer alone")[2].splitlines()
    assert [line.split()[0] for line in table[1:5] if line] == ["layer", "zero-shot", "0", "2"]


def test_evaluate_on_test(sweep: Callable[..., Stack], tmp_path: Path) -> None:
    sweep(evaluate="test", layers=[1])
    assert {"test/loss"} == set(rows(tmp_path / "sweep")["1"]) - {"layer", "parameters", "steps", "seconds"}


def test_a_layer_that_diverges_does_not_end_the_sweep(sweep: Callable[..., Stack], tmp_path: Path, capsys: Any) -> None:
    class Explode(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Stack, *_: Any) -> None:
            if trainer.global_step == 3 and pl_module.layers[1].linear.weight.requires_grad:
                pl_module.layers[1].linear.weight.data.fill_(float("nan"))

    sweep(Explode())
    found = rows(tmp_path / "sweep")
    assert [found[layer]["val/loss"] == "" for layer in ("0", "1", "2")] == [False, True, False]
    assert found["1"]["steps"] == "3"
    assert "layer 1: val/loss diverged" in capsys.readouterr().out
    sweep()  # and it is not tried again


@pytest.mark.parametrize(
    ("callbacks", "arguments", "message"),
    [
        ([], {"steps": 0}, "`steps` must be an integer, at least 1, got 0"),
        ([], {"layers": [0, 3]}, "`layers` is 3, but `layers` has 3 layers: 0 to 2 are accepted"),
        ([], {"layers": []}, "`layers` is empty"),
        ([], {"lr": -1.0}, "`lr` must be a positive number"),
        ([DominantLayer()], {}, "`scope` is DominantLayer, which chooses what is trained"),
        ([], {"module": L.LightningModule()}, "`layers_name` is not given"),
    ],
)
def test_wrong_input_is_refused_before_training(
    sweep: Callable[..., Stack], tmp_path: Path, callbacks: list[Callback], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception) as error:
        sweep(*callbacks, **arguments)
    assert message in str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_a_method_is_needed(make_trainer: Any, tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    with pytest.raises(Exception, match="No `method` is given"):
        trainer.sweep_layers(Stack(), Numbers())
