"""WarmupDecay against its definition, a Trainer's length, and a run that is interrupted or made longer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

from zolightning.callbacks import ZerothOrder
from zolightning.optim import MeZO, WarmupDecay


def sgd(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def rates(schedule: Callable[[torch.optim.Optimizer], WarmupDecay], steps: int, lr: float = 1.0) -> list[float]:
    optimizer = sgd(lr)
    scheduler, found = schedule(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_it_is_the_linear_schedule_by_default() -> None:
    reference = rates(partial(get_linear_schedule_with_warmup, num_warmup_steps=0, num_training_steps=10), 12, lr=0.3)
    assert rates(partial(WarmupDecay, total_steps=10), 12, lr=0.3) == pytest.approx(reference)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"warmup": 0.4, "final": 0.5}, [0.25, 0.5, 0.75, 1, 1, 11 / 12, 10 / 12, 9 / 12, 8 / 12, 7 / 12, 0.5, 0.5]),
        ({"warmup": 0.2, "decay": 0.5}, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        ({"decay": 0.0}, [1] * 12),
        ({"warmup": 1.0}, [*(step / 10 for step in range(1, 11)), 1, 1]),
    ],
)
def test_shares_of_ten_steps(arguments: dict[str, float], expected: list[float]) -> None:
    assert rates(partial(WarmupDecay, total_steps=10, **arguments), 12) == pytest.approx(expected)


class Recorder(Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self.rates.append(trainer.optimizers[0].record.lr[0])


@pytest.fixture
def fit(make_trainer, make_regression, regression_data: Callable[..., DataLoader]) -> Callable[..., list[float]]:
    def fit(ckpt_path: Path | None = None, save: Path | None = None, **options: int) -> list[float]:
        recorder, schedule = Recorder(), partial(WarmupDecay, warmup=0.25)
        trainer = make_trainer(callbacks=[ZerothOrder(partial(MeZO, lr=0.5), schedule), recorder], **options)
        trainer.fit(make_regression(), regression_data(4), ckpt_path=ckpt_path, weights_only=True)
        if save is not None:
            trainer.save_checkpoint(save)
        return recorder.rates

    return fit


def test_the_length_is_the_trainers(fit: Callable[..., list[float]], tmp_path: Path) -> None:
    whole = rates(partial(WarmupDecay, total_steps=8, warmup=0.25), 8, lr=0.5)
    assert fit(max_steps=8, save=tmp_path / "end.ckpt") == whole
    assert fit(max_epochs=2) == whole, "of two epochs of four batches"
    assert fit(max_epochs=2, limit_train_batches=2) == rates(
        partial(WarmupDecay, total_steps=4, warmup=0.25), 4, lr=0.5
    )
    with pytest.warns(UserWarning, match=r"continues as given now, .*; the checkpoint's run had `total_steps` 8\."):
        later = fit(tmp_path / "end.ckpt", max_steps=16)
    # The rate of the first step was set by the schedule that ended
    assert later[1:] == rates(partial(WarmupDecay, total_steps=16, warmup=0.25), 16, lr=0.5)[9:]


def test_what_is_wrong() -> None:
    for name, value in (("warmup", -0.1), ("decay", 1.5), ("final", 2.0), ("total_steps", 0)):
        with pytest.raises(ValueError, match=f"`{name}` must"):
            WarmupDecay(sgd(), **{name: value})
    scheduler = WarmupDecay(optimizer := sgd())
    optimizer.step()
    with pytest.raises(ValueError, match="no Trainer has set it"):
        scheduler.step()
    with pytest.raises(ValueError, match=r"Set `trainer\.max_steps`"):
        scheduler.fit_to(L.Trainer(max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu"))
