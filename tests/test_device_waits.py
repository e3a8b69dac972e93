"""How often a run waits for its device: once a step, and for no table that it copies there."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from conftest import METHODS
from networks import mlp, values
from optimizer_steps import MakeProblem, Method, attached
from waits import HandedOver, Waits, waiting_is_an_error
from zolightning.blocks.schedule import _norm
from zolightning.callbacks import SubspaceResampling, ZerothOrder
from zolightning.directions.second_moment import SecondMoment
from zolightning.optim import LOZO, ZOMOPI, MeZO, SubspaceOptimizer

FIRST, LAST = 7, 12  # steps, once graphs are recorded and compared


class Within(Callback):
    """Enters a context before one step and leaves it after another: between lies all that a Trainer does in steps."""

    def __init__(self, context: AbstractContextManager[None]) -> None:
        self.context, self.stack = context, ExitStack()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == FIRST:
            self.stack.enter_context(self.context)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == LAST:
            self.stack.close()

    def on_exception(self, *_: Any) -> None:
        self.stack.close()


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("name", ["mezo", "mezo-adam", "hizoo", "sparse-mezo", "lozo", "zo-mopi"])
def test_a_step_of_a_trainer_waits_for_the_gpu_once(
    cuda_graphs: bool,
    name: str,
    make_trainer: Callable[..., L.Trainer],
    make_regression: Callable[..., L.LightningModule],
    regression_data: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever stands between two steps, the batch's way to the device and new bases included."""
    allowed: list[int] = []
    callbacks: list[Callback] = [
        Within(waiting_is_an_error(monkeypatch, allowed)),
        ZerothOrder(METHODS[name], cuda_graphs=cuda_graphs),
    ]
    if issubclass(METHODS[name].func, SubspaceOptimizer):  # a momentum is taken along by waiting for products
        callbacks.insert(0, SubspaceResampling(interval=5 if name == "lozo" else 100))
    trainer = make_trainer(max_steps=LAST, accelerator="gpu", callbacks=callbacks)
    trainer.fit(make_regression(), regression_data(LAST))
    assert trainer.global_step == LAST
    assert len(allowed) == LAST - FIRST


@pytest.mark.parametrize("method", [LOZO, ZOMOPI])
def test_new_bases_wait_for_no_copy_to_the_device(method: Method, make_problem: MakeProblem) -> None:
    problem = make_problem(torch.bfloat16)
    optimizer = attached(method, problem, seed=0)
    optimizer.estimate(problem)
    optimizer.step()
    with HandedOver() as handed:
        optimizer.resample()
        assert optimizer.basis(optimizer.param_groups[0]["params"][0]).by_side
    assert handed.names == []


def test_weights_that_come_to_rest_wait_for_no_copy_to_the_device(make_problem: MakeProblem) -> None:
    problem = make_problem(torch.bfloat16)
    optimizer, weights = attached(MeZO, problem, seed=0, lr=0.1), list(problem.parameters())
    optimizer.set_blocks([weights[:1], weights[1:]], "reset")
    optimizer.activate([0])
    optimizer.estimate(problem)
    optimizer.step()
    assert optimizer.extra_bits(weights[0])
    with HandedOver() as handed:
        optimizer.activate([1])
    assert not optimizer.extra_bits(weights[0]) and handed.names == []


def test_a_second_moment_waits_for_no_copy_to_the_device() -> None:
    moment = SecondMoment(4, 2, 0, "name", torch.device("cpu"))
    with HandedOver() as handed:
        moment.add(values(3, 4))
        moment.add(values(2, 4))
    assert handed.names == [] and moment.totals[0] == 5


def test_norms_of_a_block_are_read_together() -> None:
    with Waits() as waits:
        assert _norm(list(mlp().parameters())) > 0
    assert waits.found == []  # but for one call of `tolist`, which is no operation
