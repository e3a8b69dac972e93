"""When the learning rate is lowered."""

import math
import random
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from checkpoint_runs import AS_EXPECTED, Run
from training import Records
from zolightning.callbacks import LearningRateControl, LearningRateProbe, ZerothOrder
from zolightning.optim import MeZO


class Scripted(L.LightningModule):
    """Has the losses it is told to have, with some noise, and a weight that hardly matters."""

    def __init__(self, losses: list[float], noise: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        drawn = random.Random(4)
        self.losses = [loss + drawn.gauss(0, noise) for loss in losses]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.losses[self.trainer.global_step] + 1e-3 * self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def rates(make_trainer: Any) -> Any:
    """Learning rates of the steps of a run with these losses."""

    def run(losses: list[float], *, noise: float = 0.01, **settings: Any) -> list[float]:
        records, control = Records(), LearningRateControl(**{"interval": 4, "patience": 3} | settings)
        trainer = make_trainer(
            max_steps=len(losses),
            callbacks=[ZerothOrder(partial(MeZO, lr=1.0, eps=1.0), skip_nonfinite=True), control, records],
        )
        trainer.fit(Scripted(losses, noise), DataLoader(torch.zeros(len(losses), 1), batch_size=1))
        return [record.lr[0] for record in records.records]

    return run


def test_losses_that_fall_keep_the_rate(rates: Any) -> None:
    losses = [1 - 0.02 * step for step in range(40)]
    losses[1] = math.nan  # of a step that is skipped
    assert set(rates(losses)) == {1.0}


def test_losses_that_rise_lower_it_at_once(rates: Any) -> None:
    # Of intervals of four steps the third is the first to be above the best one; the next one is then the best.
    assert rates([1.0] * 4 + [0.8] * 4 + [1.2] * 16) == [1.0] * 12 + [0.5] * 12


@pytest.mark.parametrize(("rise", "rate"), [(0.98, 1.0), (1.02, 0.5)])
def test_a_rise_is_three_standard_errors_of_a_difference(rise: float, rate: float, rates: Any) -> None:
    one, other = [1.03, 0.97] * 2, [1.04, 0.96] * 2
    by = rise * 3 * math.sqrt((statistics.variance(one) + statistics.variance(other)) / 4)
    assert rates([*one, *(loss + by for loss in other), 2.0], noise=0.0)[-1] == rate


def test_losses_that_stay_lower_it_after_some_patience(rates: Any) -> None:
    losses = [1.0] * 4 + [0.9] * 4 + [0.91] * 20  # within the noise: nothing rises
    assert rates(losses, factor=0.1) == [1.0] * 20 + [0.1] * 8
    means = [1.0, 1.01, 0.99, 1.0, 1.0, 0.98, 1.0]  # two in a row are no better, and one after the next best
    assert set(rates([mean + by for mean in means for by in (0.1, -0.1) * 2], noise=0.0)) == {1.0}


def test_the_rate_has_a_floor(rates: Any) -> None:
    assert rates([float(step // 4 % 2) for step in range(40)], factor=0.1, min_scale=0.05)[-1] == 0.05


def test_a_probe_is_waited_for(make_trainer: Any, make_regression: Any, regression_data: Any) -> None:
    """The losses of steps that move nothing do not count, and it is the probed rate that is lowered."""
    records, control = Records(), LearningRateControl(interval=3, patience=1, factor=0.5, min_scale=1e-9)
    callbacks = [control, LearningRateProbe(4, 8), ZerothOrder(partial(MeZO, lr=1.0)), records]
    make_trainer(max_steps=60, callbacks=callbacks).fit(make_regression(), regression_data())
    rates = [record.lr[0] for record in records.records]
    assert rates[:4] == [0.0] * 4
    assert len(set(rates[4:10])) == 1  # two intervals, for the first of them is the best
    assert {rate / rates[4] for rate in rates[4:]} <= {0.5**power for power in range(20)}
    assert rates[-1] < rates[4]


@pytest.mark.parametrize("stop", [5, 12])
def test_resuming_equals_not_stopping(stop: int, make_trainer: Any, regression_data: Any, tmp_path: Path) -> None:
    def run(folder: str, **options: Any) -> Run:
        control, data = LearningRateControl(interval=3, patience=1), regression_data().dataset
        return Run(make_trainer, tmp_path / folder, data, callbacks=[control], **options)

    whole = run("whole").fit(validate=False)
    run("parts", max_steps=stop).fit(validate=False)
    parts = run("parts").fit(ckpt_path=tmp_path / "parts" / "last.ckpt", validate=False)
    parts.assert_ends_as(whole)
    scale = whole.trainer.optimizers[0].param_groups[0]["lr_scale"]
    assert scale < 1 and parts.trainer.optimizers[0].param_groups[0]["lr_scale"] == scale


test_resuming_equals_not_stopping.pytestmark += AS_EXPECTED


def test_refusals(make_trainer: Any, make_regression: Any, regression_data: Any) -> None:
    with pytest.raises(MisconfigurationException, match="LearningRateControl needs a zeroth-order method"):
        make_trainer(max_steps=1, callbacks=[LearningRateControl()]).fit(make_regression(), regression_data())
    with pytest.raises(ValueError, match="`factor` must be below 1, got 1"):
        LearningRateControl(factor=1)
    with pytest.raises(ValueError, match=r"`lr_control\.interval` must be an integer, at least 2, got 1"):
        LearningRateControl(interval=1)
