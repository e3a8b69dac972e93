"""A fit of a stranger's module under ZerothOrder."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from zolightning.callbacks import ZerothOrder
from zolightning.optim import MeZO

MakeTrainer = Callable[..., L.Trainer]
MakeData = Callable[..., DataLoader]
Fit = Callable[..., L.Trainer]

METHOD = partial(MeZO, lr=1e-2, eps=1e-2)


@pytest.fixture
def fit(make_trainer: MakeTrainer, regression_data: MakeData) -> Fit:
    def fit(module: Any, *callbacks: Callback, zeroth_order: ZerothOrder | None = None, **kwargs: Any) -> L.Trainer:
        trainer = make_trainer(
            **{"max_steps": 4, "callbacks": [zeroth_order or ZerothOrder(METHOD), *callbacks]} | kwargs
        )
        trainer.fit(module, regression_data())
        return trainer

    return fit
