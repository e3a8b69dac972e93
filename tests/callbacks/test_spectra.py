"""Spectra: against decompositions of the matrices themselves, and without a trace in the training."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from zolightning.callbacks import Spectra, SubspaceResampling, ZerothOrder
from zolightning.callbacks.spectra import spectra_figure, stable_rank
from zolightning.optim import ZOMOPI, StepRecord, SubspaceMeZO, SubZero

ALL = ("estimate", "momentum", "gradient")
ZO_MOPI = partial(ZOMOPI, lr=0.05, rank=3, power_rank=2, vector_lr=0.01)


class Watch(Callback):
    """Keeps records, and of each step the momentum and the estimate of the first layer as whole matrices."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.matrices: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        optimizer, weight = trainer.optimizers[0], pl_module.net[0].weight
        self.records.append(optimizer.record)
        basis = optimizer.basis(weight)
        momentum = optimizer.state[weight]["momentum_buffer"].view(basis.core_shape((5, 4)))
        estimate = optimizer.core_gradient(weight, optimizer.record)
        self.matrices.append({"momentum": basis.lift(momentum), "estimate": basis.lift(estimate)})


@pytest.fixture
def fit(
    make_trainer: Callable[..., L.Trainer],
    make_regression: Callable[..., L.LightningModule],
    regression_data: Callable[..., DataLoader],
) -> Callable[..., tuple[L.LightningModule, Watch]]:
    def fit(*callbacks: Callback, method: Any = ZO_MOPI, **kwargs: Any) -> tuple[L.LightningModule, Watch]:
        watch, module = Watch(), make_regression()
        own = [SubspaceResampling(4), ZerothOrder(method), watch, *callbacks]
        trainer = make_trainer(**{"max_steps": 7, "callbacks": own, "log_every_n_steps": 1} | kwargs)
        trainer.fit(module, regression_data())
        return module, watch

    return fit


@pytest.mark.parametrize("precision", [pytest.param("32-true", marks=pytest.mark.slow), "bf16-true"])
def test_training_keeps_its_bits(fit: Callable[..., Any], tmp_path: Path, precision: str) -> None:
    plain, plain_watch = fit(precision=precision)
    logger = TensorBoardLogger(tmp_path)
    looked, watch = fit(Spectra(["weight"], 1, ALL), precision=precision, logger=logger)
    assert watch.records == plain_watch.records
    assert all(torch.equal(p, q) for p, q in zip(looked.parameters(), plain.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in looked.parameters())


def test_values_and_plots(fit: Callable[..., Any], tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    _, watch = fit(Spectra([r"net\.0"], 3, ALL), logger=logger, log_every_n_steps=2)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    assert [image.step for image in events.Images("spectra/net.0.weight")] == [0, 3, 6]
    assert "spectra/net.3.weight" not in events.Tags()["images"]
    for source in ("estimate", "momentum"):
        logged = events.Scalars(f"stable_rank/{source}/net.0.weight")
        assert [event.step for event in logged] == [0, 3, 6]
        for event in logged:
            values = torch.linalg.svdvals(watch.matrices[event.step][source])
            expected = (values.square().sum() / values[0] ** 2).item()
            assert event.value == pytest.approx(expected, rel=1e-4)


def test_the_gradient_is_that_of_the_weights_the_network_computes_with(
    fit: Callable[..., Any], make_regression: Callable[..., L.LightningModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an interval, in evaluation mode, on the step's batch."""
    found: list[Tensor] = []
    expected: list[Tensor] = []

    class Peek(Callback):
        def on_train_batch_start(
            self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            twin = make_regression().eval()
            twin.load_state_dict(pl_module.state_dict())
            twin.training_step(batch, 0).backward()
            expected.append(torch.linalg.svdvals(twin.net[0].weight.grad))

    class Keep(Spectra):
        def on_train_batch_start(self, *args: Any) -> None:
            super().on_train_batch_start(*args)
            found.append(self._gradients["net.0.weight"])

    fit(Peek(), Keep(["net.0"], 1, ["gradient"]))
    assert len(found) == 7
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_momentum_of_adam_and_two_sided_bases(fit: Callable[..., Any], tmp_path: Path) -> None:
    method = partial(SubZero, lr=0.02, rank=2, betas=(0.9, 0.95))
    spectra = Spectra(["weight"], 1, ("estimate", "momentum"))
    callbacks = [SubspaceResampling(3), ZerothOrder(method), spectra]
    logger = TensorBoardLogger(tmp_path)
    fit(callbacks=callbacks, logger=logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    for source in ("momentum", "estimate"):
        assert all(1 <= event.value <= 2 for event in events.Scalars(f"stable_rank/{source}/net.0.weight"))


def test_stable_rank() -> None:
    assert stable_rank(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(3)
    assert stable_rank(torch.tensor([3.0, 1.0, 0.0])) == pytest.approx(10 / 9)
    assert stable_rank(torch.zeros(4)) == 0


def test_figure() -> None:
    figure = spectra_figure({"estimate": torch.tensor([4.0, 2.0, 0.0]), "gradient": torch.tensor([8.0, 1.0])}, "w")
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert [list(line.get_ydata()) for line in axes.lines] == [[1.0, 0.5], [1.0, 0.125]]
    assert [line.get_label() for line in axes.lines] == ["estimate", "gradient"]


class TestRefusals:
    def test_what_matches_nothing(self, fit: Callable[..., Any]) -> None:
        with pytest.raises(MisconfigurationException, match=r"'bias', which matches no matrix .*net\.0\.weight"):
            fit(Spectra(["bias"]))

    def test_momentum_of_a_method_without(self, fit: Callable[..., Any]) -> None:
        with pytest.raises(MisconfigurationException, match="`sources` has 'momentum', but the method keeps none"):
            fit(Spectra(["weight"], sources=["momentum"]), method=partial(SubspaceMeZO, rank=2))

    @pytest.mark.parametrize(
        "arguments",
        [
            {"patterns": "weight"},
            {"patterns": []},
            {"patterns": ["("]},
            {"patterns": ["w"], "every_n_steps": 0},
            {"patterns": ["w"], "sources": "gradient"},
            {"patterns": ["w"], "sources": ["hessian"]},
            {"patterns": ["w"], "sources": []},
        ],
    )
    def test_values(self, arguments: dict[str, Any]) -> None:
        *_, name = arguments
        with pytest.raises(ValueError, match=f"`{name}` "):
            Spectra(**arguments)
