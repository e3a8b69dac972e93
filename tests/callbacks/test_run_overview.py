"""The first words of a run, and what TensorBoard is told of it."""

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from zolightning.blocks import RandomPermutation
from zolightning.callbacks import (
    ActivationBases,
    BlockCoordinateDescent,
    KeepLedger,
    RunOverview,
    SubspaceResampling,
    ZerothOrder,
)
from zolightning.optim import LOZO, MeZO


@pytest.fixture
def fit(
    tmp_path: Path, make_trainer: Callable[..., L.Trainer], make_regression: Any, regression_data: Any
) -> Callable[..., EventAccumulator]:
    def run(*callbacks: Any) -> EventAccumulator:
        module = make_regression()
        module.validation_step = lambda batch, batch_idx: module.log("val/loss", module.net(batch[0]).mean())
        logger = TensorBoardLogger(tmp_path, "run")
        trainer = make_trainer(
            max_steps=4,
            val_check_interval=2,
            num_sanity_val_steps=1,  # of which nothing is logged
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            logger=logger,
            log_every_n_steps=1,
            callbacks=[*callbacks, RunOverview("zolightning fit --config mine.yaml")],
        )
        trainer.validate(module, regression_data(), verbose=False)
        trainer.fit(module, regression_data(), regression_data())
        return EventAccumulator(logger.log_dir).Reload()

    return run


def hyperparameters(events: EventAccumulator) -> dict[str, Any]:
    """Of TensorBoard's table."""
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}


def test_overview(fit: Callable[..., EventAccumulator], caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level("INFO")
    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss", mode="max")
    events = fit(ZerothOrder(partial(MeZO, lr=0.5, momentum=0.9, num_queries=3)), best, KeepLedger(tmp_path))
    first_words = next(message for message in caplog.messages if message.startswith("method"))
    for part in (
        "MeZO, lr 0.5, ",
        "momentum 0.9",
        "num_queries 3",
        "6 forward passes",
        "weights 0.0 MB, state 0.0 MB, scratch 0.0 MB, activations not estimated, logits not estimated",
        "all parameters: 31 of 31 parameters train",
        "tensorboard --logdir ",
        "run/version_0/config.yaml --ckpt_path last",
    ):
        assert part in first_words
    assert "eps" not in first_words  # the default
    text = events.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "MeZO, lr 0.5" in text and "zolightning fit --config mine.yaml" in text
    assert [event.step for event in events.Scalars("by_forward_passes/val/loss")] == [0, 12, 24]
    assert [event.value for event in events.Scalars("by_forward_passes/val/loss")] == [
        event.value for event in events.Scalars("val/loss")
    ]
    assert [tag for tag in events.Tags()["scalars"] if tag.startswith("by_")] == ["by_forward_passes/val/loss"]
    in_the_fit = [event.value for event in events.Scalars("val/loss")][1:]
    assert events.Scalars("best/val/loss")[0].value == max(in_the_fit) != in_the_fit[-1]


def test_its_time_is_when_the_fit_began(fit: Callable[..., EventAccumulator]) -> None:
    """What runs before it, such as a linear probe, is a part of the run."""
    times: list[float] = []

    class Probe(Callback):
        def on_fit_start(self, *_: Any) -> None:
            times.append(time.time())

    events = fit(ZerothOrder(partial(MeZO, lr=0.5)), Probe())
    assert events.Tensors("run/text_summary")[0].wall_time < times[0]


def test_backpropagation(fit: Callable[..., EventAccumulator], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    events = fit()
    assert any("backpropagation by SGD, lr 0.1" in message for message in caplog.messages)
    assert hyperparameters(events).items() >= {"method": "SGD", "method.lr": 0.1, "trainable": 31}.items()


def test_what_runs_are_compared_by(fit: Callable[..., EventAccumulator]) -> None:
    """Also without a best score."""
    blocks = BlockCoordinateDescent(RandomPermutation(), interval=3, blocks_per_step=2, patterns=["net.0", "net.3"])
    found = hyperparameters(fit(ZerothOrder(partial(LOZO, lr=0.5, rank=1)), SubspaceResampling(interval=2), blocks))
    expected = {
        "method": "LOZO",
        "method.lr": 0.5,
        "method.rank": 1,
        "method.noise": "gaussian",
        "resampling.interval": 2,
        "blocks.order": "RandomPermutation",
        "blocks.interval": 3,
        "blocks.blocks_per_step": 2,
        "cuda_graphs": False,
        "precision": "32-true",
        "max_steps": 4,
        "trainable": 31,
    }
    assert found.items() >= expected.items()
    assert not {"class", "method.class", "scope", "task", "resampling.bases"} & found.keys()
    assert not {"method.refresh", "method.folds", "method.anchor"} & found.keys()  # what the method counts


class Demanding(MeZO):
    """A method whose learning rate has no default."""

    def __init__(self, params: Any, lr: float, **common: Any) -> None:
        super().__init__(params, lr, **common)


def test_a_method_without_defaults(fit: Callable[..., EventAccumulator], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fit(ZerothOrder(partial(Demanding, lr=0.5)))
    assert any("Demanding, lr 0.5, " in message and "num_queries 1" in message for message in caplog.messages)


def test_what_bases_of_inputs_take_is_said(
    fit: Callable[..., EventAccumulator], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    bases = ActivationBases(examples="batch")
    fit(ZerothOrder(partial(LOZO, lr=1e-3, rank=1)), SubspaceResampling(bases=bases))
    assert any("sketches 0.0 MB" in message for message in caplog.messages)


def test_directions_that_are_kept_for_the_next_refresh(
    fit: Callable[..., EventAccumulator], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zolightning.memory.in_units", str)
    caplog.set_level("INFO")
    for decay, skip in ((0.0, 0), (0.5, 0), (0.5, 1)):
        bases = ActivationBases(examples="batch", refresh=True, decay=decay, skip=skip)
        fit(ZerothOrder(partial(LOZO, lr=1e-3, rank=1)), SubspaceResampling(bases=bases))
    without, one, two = map(int, re.findall(r", state (\d+), ", caplog.text))
    assert without == 4 * (4 + 5)  # the factor and the core of a matrix of five rows and four columns
    assert one - without == 4 * (4 + 2)  # a direction of four inputs, its eigenvalue and the energy
    assert two - one == 4 * (4 + 1)


def test_the_run_is_the_same_without_it(
    make_trainer: Callable[..., L.Trainer], make_regression: Any, regression_data: Any
) -> None:
    weights = []
    for callbacks in ([], [RunOverview()]):
        module = make_regression()
        method = ZerothOrder(partial(MeZO, lr=0.5, momentum=0.9))
        make_trainer(max_steps=3, callbacks=[method, *callbacks]).fit(module, regression_data())
        weights.append([parameter.tolist() for parameter in module.parameters()])
    assert weights[0] == weights[1]
