"""What a step logs, and what its loss logs in it."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from own_loop import OwnLoop
from zolightning.optim import MeZO
from zolightning.partners import log_number

MakeTrainer = Callable[..., L.Trainer]
MakeData = Callable[..., DataLoader]
Fit = Callable[..., dict[str, float]]


@pytest.fixture
def fit(make_trainer: MakeTrainer, regression_data: MakeData) -> Fit:
    """Fits a module, and returns its metrics at the end."""

    def fit(module: L.LightningModule, max_steps: int) -> dict[str, float]:
        trainer = make_trainer(max_steps=max_steps)
        trainer.fit(module, regression_data())
        return {name: value.item() for name, value in trainer.logged_metrics.items()}

    return fit


def test_what_a_step_logs(fit: Fit) -> None:
    module = OwnLoop(lambda p: MeZO(p, lr=1e-3, num_queries=2))
    logged = fit(module, max_steps=3)
    record = module.records[-1]
    assert logged["train/loss"] == pytest.approx(record.loss, rel=1e-6)
    assert logged["zo/lr"] == pytest.approx(1e-3)
    assert logged["zo/forward_passes"] == 12
    rms = (sum(g**2 for g in record.projected_grads) / 2) ** 0.5
    assert logged["zo/projected_grad"] == pytest.approx(rms, rel=1e-6)


@pytest.mark.parametrize("own_name", ["train/loss", "loss"])
def test_the_loss_function_logs_once_a_step(fit: Fit, own_name: str) -> None:
    """Under any name; the step's own metric gives way to one of its name."""
    module, values = OwnLoop(), []
    inner = module.loss

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        value = inner(batch)
        values.append(value.item())
        module.log(own_name, value, on_epoch=True)
        module.log_dict({"a": value, "b": -value})
        return value

    module.loss = loss
    logged = fit(module, max_steps=1)
    first = module.records[0].losses[0]  # evaluations that only audit the parameters log nothing
    assert logged["a"] == pytest.approx(first) and logged["b"] == pytest.approx(-first)
    assert logged[f"{own_name}_step"] == pytest.approx(first) != pytest.approx(module.records[0].loss)
    assert ("train/loss" in logged) == (own_name != "train/loss")
    assert "log" not in vars(module)


@pytest.mark.filterwarnings("ignore:`evaluations_per_forward` is 1")
@pytest.mark.parametrize("way", ["weight alone", "batch statistics"])
def test_a_step_that_begins_anew_without_sharing_a_forward_logs_its_first_evaluation(fit: Fit, way: str) -> None:
    """Once, though one before it was broken off in the network, or ran to its end with a wrong output."""

    class Network(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if way == "weight alone":
                return x @ (1 + self.weight)
            hidden = super().forward(x)
            return hidden / hidden.abs().mean(dim=0)

    class Logging(OwnLoop):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.frozen_norm = Network(4, 4, bias=False), torch.nn.Identity()

        def on_train_start(self) -> None:
            self.optimizers().optimizer.attach(self, evaluations_per_forward=2)

        def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            self.log("rows", float(len(batch[0])), on_step=False, on_epoch=True, reduce_fx="sum")
            loss = super().loss((batch[0], batch[1].expand(-1, 4)))
            self.log("first", loss)
            return loss

    module = Logging()
    logged = fit(module, max_steps=1)
    assert logged["first"] == pytest.approx(module.records[0].losses[0], rel=1e-6) and logged["rows"] == 4


def test_a_log_of_its_own_is_respected(fit: Fit) -> None:
    module, names = OwnLoop(), []

    def log(name: str, value: Any, **kwargs: Any) -> None:
        names.append(name)

    module.log = log
    inner = module.loss
    module.loss = lambda batch: (module.log("mine", 1.0), inner(batch))[1]
    fit(module, max_steps=2)
    assert names.count("mine") == 2 and names.count("train/loss") == 2 and module.log is log


@pytest.mark.parametrize("own_log", [False, True])
def test_numbers_are_where_lightning_puts_them(
    make_trainer: MakeTrainer, regression_data: MakeData, monkeypatch: pytest.MonkeyPatch, own_log: bool
) -> None:
    """At each step and in each epoch, for callbacks, bars and loggers, though most steps call no ``log``."""

    def shown(trainer: L.Trainer) -> list[dict[str, float]]:
        found = trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics
        return [{name: torch.as_tensor(value).tolist() for name, value in metrics.items()} for metrics in found]

    class Logging(OwnLoop):
        def loss(self, batch: tuple[Tensor, Tensor]) -> Any:
            loss = super().loss(batch)
            self.log("inner", loss[None], prog_bar=True)
            self.log("weighted", loss, on_epoch=True, batch_size=1 + len(self.losses) % 3)
            return loss

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            self.log("own", self.records[-1].losses[0])  # behind those of the step
            log_number(self, "mean", float(batch_idx), on_epoch=True)

        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            self.log("val/loss", F.mse_loss(self.net(batch[0]), batch[1]))

        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step % 3 == 0:
                self.log("sometimes", float(self.trainer.global_step))
            self.seen.append(shown(self.trainer))

    class WithLog(Logging):
        def log(self, name: str, *args: Any, **options: Any) -> None:
            self.names.append(name)
            super().log(name, *args, **options)

    def fit() -> tuple[list[Any], list[Any], list[str]]:
        torch.manual_seed(1)
        module, rows = (WithLog if own_log else Logging)(lambda p: MeZO(p, lr=1e-2)), []
        module.seen, module.names = [], []
        logger = DummyLogger()
        logger.log_metrics = lambda metrics, step: rows.append((step, metrics))
        trainer = make_trainer(logger=logger, max_epochs=3, log_every_n_steps=2, val_check_interval=3)
        trainer.fit(module, regression_data(), regression_data())
        return rows, [*module.seen, shown(trainer)], module.names

    rows, seen, names = fit()
    assert len({metrics["zo/projected_grad"] for metrics, *_ in seen}) == 21  # of three epochs, by step
    assert names.count("zo/lr") == names.count("inner") == (21 if own_log else 0)
    monkeypatch.setattr("zolightning.training_loop._has_logged_again", lambda *_, **__: False)
    assert (rows, seen) == fit()[:2]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            lambda log, value: log("own", value, prog_bar=True),
            "twice in `training_step` with different arguments",
        ),
        (lambda log, value: log("own", torch.ones(2)), "the tensor must have a single element"),
    ],
)
def test_what_lightning_refuses_is_refused_later_too(fit: Fit, changed: Callable[..., None], said: str) -> None:
    module = OwnLoop()
    inner = module.loss

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        value = inner(batch)
        changed(module.log, value) if len(module.records) == 3 else module.log("own", value)
        return value

    module.loss = loss
    with pytest.raises((MisconfigurationException, ValueError), match=said):
        fit(module, max_steps=5)
    assert len(module.records) == 3
