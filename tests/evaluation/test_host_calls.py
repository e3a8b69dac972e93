"""What a step costs the host in calls of Python: for each layer, and for a small step under Lightning."""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from graph_runs import CPUCapture, inputs, seeded
from optimizer_steps import attached, estimates
from zolightning import kernels, zeroth_order_step
from zolightning.evaluation.graphs import GraphedNetwork
from zolightning.kernels import native
from zolightning.optim import (
    LOZO,
    ZOMOPI,
    HiZOO,
    MeZO,
    MeZOAdam,
)


class Hollow(CPUCapture):
    """A stand-in for CUDA graphs whose replays do nothing once they have been compared with runs."""

    is_hollow = False

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        output, replay = super().record(run)
        return output, lambda: None if self.is_hollow else replay()


def calls_of(function: Callable[[], Any]) -> int:
    """How many functions it calls, of Python and of C, as the interpreter counts them."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    ("method", "evaluations_per_forward", "bound"),
    [
        *((MeZO, 1, 12), (HiZOO, 1, 50), (partial(LOZO, rank=2), 1, 28)),
        (partial(ZOMOPI, rank=2, power_rank=1, num_queries=4), 8, 160),
    ],
)
def test_what_another_layer_costs_the_host_where_graphs_are_replayed(
    method: Callable[..., Any], evaluations_per_forward: int, bound: int
) -> None:
    counts = []
    for layers in (4, 12):
        net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
        module, capture = seeded(lambda net=net: net), Hollow()
        optimizer = method(module.parameters(), seed=0)
        optimizer.attach(module, evaluations_per_forward)
        optimizer.evaluator.graphs = GraphedNetwork(module.net, capture)
        estimate = partial(optimizer.estimate, partial(module.loss, inputs(3, 4)))
        for _ in range(5):  # records, and compares
            estimate()
            optimizer.step()
        capture.is_hollow = True
        before = capture.replayed
        counts.append(calls_of(estimate))
        assert capture.replayed == before and capture.recorded
    assert (counts[1] - counts[0]) / 16 < bound  # for each of a layer's two parameters


@pytest.mark.parametrize(("method", "bound"), [(MeZO, 140), (partial(LOZO, rank=2), 230)])
def test_what_another_layer_costs_the_host_without_graphs(method: Callable[..., Any], bound: int) -> None:
    if not native.available(torch.empty(2)):
        pytest.skip("torch's own loops are functions of Python")
    counts = []
    for layers in (4, 12):
        net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
        optimizer = attached(method, net, seed=0)
        estimate = partial(optimizer.estimate, lambda net=net: net(torch.ones(2, 8)).square().mean())
        estimate()  # finds where parameters are read
        counts.append((calls_of(estimate), calls_of(optimizer.step)))
    per_parameter = [(many - few) / 16 for few, many in zip(*counts, strict=True)]
    assert sum(per_parameter) < bound, per_parameter


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize(("method", "bound"), [(MeZO, 15), (MeZOAdam, 24), (HiZOO, 22), (partial(LOZO, rank=2), 24)])
def test_what_another_layer_costs_the_host_in_an_update_on_a_gpu(
    method: Callable[..., Any], bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton_loops = import_module("zolightning.kernels.triton_loops")
    launched: list[Any] = []

    def for_each(loop: Callable[..., None], calls: list[dict[str, Any]]) -> None:
        triton_loops.for_each(getattr(triton_loops, loop.__name__), calls)

    monkeypatch.setattr(kernels, "for_each", for_each)
    monkeypatch.setattr(triton_loops, "_launch", lambda *arguments, **constants: launched.append(arguments))
    counts = []
    for layers in (4, 12):
        for optimizer in estimates(method, layers, width=16, count=3):
            launched.clear()
            count = calls_of(optimizer.step)
        counts.append(count)
        assert 1 <= len(launched) <= 2  # of all weights, or of vectors and of cores
    assert (counts[1] - counts[0]) / 16 < bound


def test_what_a_small_step_under_lightning_costs_the_host(
    make_trainer: Callable[..., L.Trainer], regression_data: Callable[..., Any]
) -> None:
    counts = []

    class Counting(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization, self.net = False, nn.Linear(4, 1)

        def loss(self, inputs: Tensor) -> Tensor:
            loss = self.net(inputs).square().mean()
            self.log("train/first", loss, sync_dist=True)
            return loss

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            counts.append(calls_of(lambda: zeroth_order_step(self, lambda: self.loss(batch[0]))))

        def configure_optimizers(self) -> MeZO:
            return MeZO(self.parameters(), seed=0)

    make_trainer(max_steps=5).fit(Counting(), regression_data())
    assert max(counts[2:]) < 2500  # one number by `log` itself takes 1,900
