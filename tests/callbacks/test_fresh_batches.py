"""A ``training_step`` that changes its batch is evaluated on the same batch all the same."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Lock
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from training import Records
from zolightning.callbacks import ZerothOrder
from zolightning.evaluation.fresh_batches import FreshBatches
from zolightning.optim import MeZO
from zolightning.optim.estimators import PerExample

ROWS = [{"x": row, "y": row.sum(0, keepdim=True)} for row in torch.randn(16, 4)]


def losses(make_trainer: Any, module: L.LightningModule, change: Callable[[Any], Any], **settings: Any) -> Any:
    """The losses of four steps on what `change` makes of a batch."""

    def training_step(batch: Any, batch_idx: int) -> Tensor:
        changed = change(batch)
        return F.mse_loss(module.net(changed["x"]), changed["y"])

    method, records = settings.pop("method", partial(MeZO, lr=1e-2)), Records()
    module.training_step = training_step
    make_trainer(max_steps=4, callbacks=[ZerothOrder(method, **settings), records]).fit(
        module, DataLoader(ROWS, batch_size=4)
    )
    return [record.losses for record in records.records]


def not_in_place(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"x": batch["x"] * 3 + 1, "y": batch["y"]}


def in_place(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    batch["x"].mul_(3)
    batch["x"] += 1
    return batch


def assigned(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    batch["x"] = batch["x"] * 3 + 1
    return batch


def taken_out(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"x": batch.pop("x") * 3 + 1, "y": batch["y"]}


@pytest.mark.parametrize("change", [in_place, assigned, taken_out])
@pytest.mark.parametrize(
    "settings",
    [{}, {"micro_batch_size": 3}, {"method": partial(MeZO, lr=1e-2, num_queries=4, estimator=PerExample())}],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_the_losses_of_a_step_are_of_one_batch(
    make_trainer: Any, make_regression: Any, change: Any, settings: dict[str, Any]
) -> None:
    expected = losses(make_trainer, make_regression(), not_in_place, **settings)
    assert losses(make_trainer, make_regression(), change, **settings) == expected


def test_a_change_in_a_later_step_is_refused(make_trainer: Any, make_regression: Any) -> None:
    module = make_regression()

    def change(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return in_place(batch) if module.global_step == 2 else batch

    with pytest.raises(ValueError, match="has changed its batch in place, which it did not do in the first"):
        losses(make_trainer, module, change)


@dataclass
class Pair:
    x: Tensor
    names: list[str]


@dataclass(frozen=True)
class FrozenPair:
    x: Tensor
    names: list[str]


class Graph:
    """Holds its tensors in another object, which knows it, as PyTorch Geometric's graphs do."""

    def __init__(self) -> None:
        self.store = SimpleNamespace(x=torch.ones(2), graph=self)
        self.counts = np.ones(2)

    def __repr__(self) -> str:
        return f"{self.store.x} {self.counts} {vars(self).keys()}"


@pytest.mark.parametrize(
    ("batch", "change"),
    [
        (Graph(), lambda graph: graph.store.x.add_(1)),
        (Graph(), lambda graph: setattr(graph.store, "x", graph.store.x + 1)),
        ([Graph()], lambda batch: setattr(batch[0], "y", 1)),
        (Graph(), lambda graph: graph.counts.__iadd__(1)),
        (Pair(torch.ones(2), ["a"]), lambda batch: batch.x.add_(1)),
        (Pair(torch.ones(2), ["a"]), lambda batch: batch.names.append("b")),
        (Pair(torch.ones(2), ["a"]), lambda batch: setattr(batch, "x", None)),
        (FrozenPair(torch.ones(2), ["a"]), lambda batch: batch.x.add_(1)),
        ([torch.ones(2), {"y": torch.ones(2)}], lambda batch: batch[1]["y"][0].zero_()),
        ((torch.ones(2),), lambda batch: batch[0].resize_(1)),
    ],
    ids=[
        "a graph",
        "a graph's tensor",
        "a graph in a list",
        "an array",
        "a field",
        "a list in it",
        "another field",
        "a frozen field",
        "a view",
        "a shape",
    ],
)
def test_what_a_batch_may_be(batch: Any, change: Callable[[Any], Any]) -> None:
    batches, before = FreshBatches(), repr(batch)
    for _ in range(3):
        batches.evaluate(change, batch)
        assert repr(batch) == before


def test_a_change_of_what_cannot_be_copied_is_refused() -> None:
    batch = SimpleNamespace(x=torch.ones(2), lock=Lock())
    FreshBatches().evaluate(repr, batch)
    with pytest.raises(ValueError, match="has changed its batch in place, which cannot be copied, but is evaluated"):
        FreshBatches().evaluate(lambda batch: batch.x.add_(1), batch)


def test_a_batch_that_is_not_changed_is_not_copied() -> None:
    batches, batch, given = FreshBatches(), {"x": torch.ones(2)}, []
    for _ in range(3):
        batches.evaluate(given.append, batch)
    assert [one is batch for one in given] == [False, True, True]
