"""The progress bar of the command line."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from torch.utils.data import DataLoader

from zolightning.callbacks import StepProgressBar, ZerothOrder, step_progress
from zolightning.optim import MeZO


class Asked(StepProgressBar):
    """Keeps the steps at which the bar asks for its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        self.steps.append(trainer.global_step)
        return super().get_metrics(trainer, pl_module)


@pytest.mark.parametrize(("seconds", "steps"), [(0.01, [1, 11, 12]), (0.06, [1, 3, 5, 7, 9, 11, 12])])
def test_it_asks_for_numbers_ten_times_a_second_at_most(
    seconds: float,
    steps: list[int],
    make_trainer: Callable[..., L.Trainer],
    make_regression: Callable[..., L.LightningModule],
    regression_data: Callable[..., DataLoader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bar = Asked()
    # A step takes `seconds`, and the last one is always shown.
    monkeypatch.setattr(step_progress, "time", SimpleNamespace(monotonic=lambda: seconds * trainer.global_step))
    trainer = make_trainer(callbacks=[ZerothOrder(partial(MeZO, lr=0.01)), bar], max_steps=12, enable_progress_bar=True)
    trainer.fit(make_regression(), regression_data(num_batches=12))
    assert list(dict.fromkeys(bar.steps)) == steps  # Lightning asks at the end of the epoch, too
    assert bar.train_progress_bar.n == bar.train_progress_bar.total == 12


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_that_goes_on_in_mid_epoch(
    make_trainer: Callable[..., L.Trainer],
    make_regression: Callable[..., L.LightningModule],
    regression_data: Callable[..., DataLoader],
    tmp_path: Path,
) -> None:
    """Lightning calls no ``on_train_epoch_start`` then."""
    for max_steps, path in ((5, None), (8, tmp_path / "5.ckpt")):
        bar, callback = StepProgressBar(), ZerothOrder(partial(MeZO, lr=0.01))
        trainer = make_trainer(callbacks=[callback, bar], max_steps=max_steps, enable_progress_bar=True)
        trainer.fit(make_regression(), regression_data(num_batches=12), ckpt_path=path)
        assert bar.train_progress_bar.n == bar.train_progress_bar.total == max_steps
        trainer.save_checkpoint(tmp_path / "5.ckpt")
    assert bar.train_progress_bar.initial == 5  # so that the speed is that of this run
