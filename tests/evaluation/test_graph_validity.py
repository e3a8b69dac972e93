"""Graphs stand only for the state of a network that they were recorded in; with the stand-in of graph_runs.py."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graph_runs import (
    CPUCapture,
    equal,
    inputs,
    mlp,
    seeded,
)
from zolightning.evaluation.graphs import GraphedNetwork
from zolightning.optim import MeZO


class Cached(nn.Linear):
    """A layer that keeps what it has computed from a weight until someone empties its cache."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "gain" not in self.cache:
            self.cache["gain"] = self.bias.exp()
        return super().forward(x) * self.cache["gain"]


class Configured(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.config = SimpleNamespace(scale=1.0)
        self.pair = (1.0, [1.0])
        self.on_the_host = torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.config.scale * self.pair[1][0] * float(self.on_the_host.numpy())


@dataclass(frozen=True)
class Times:
    """A hook that multiplies outputs."""

    factor: float

    def __call__(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * self.factor


class TestTheStateOfTheNetwork:
    """The losses of runs with and without graphs, where something in the network changes."""

    @staticmethod
    def compare(
        make: Callable[[], nn.Module],
        loss: Callable[[nn.Module, int], Tensor],
        between: Callable[[nn.Module, int], Any] = lambda *_: None,
    ) -> CPUCapture:
        capture = CPUCapture()
        records = []
        for is_graphed in (False, True):
            module = seeded(make)
            optimizer = MeZO(module.parameters(), lr=1e-2, num_queries=2, seed=5)
            optimizer.attach(module)
            if is_graphed:
                optimizer.evaluator.graphs = GraphedNetwork(module.net, capture)
            records.append([])
            for step in range(6):
                between(module.net, step)
                records[-1].append(optimizer.estimate(partial(loss, module.net, step)))
                optimizer.step()
        assert equal(*records)
        return capture

    def test_a_second_call_with_other_attributes(self) -> None:
        def loss(net: nn.Module, step: int) -> Tensor:
            output = net(inputs(2, 4, seed=step))
            net.config.scale = 2.0  # as a reference without adapters
            try:
                return (output - net(inputs(2, 4, seed=step))).square().mean() + output.mean()
            finally:
                net.config.scale = 1.0

        with pytest.warns(UserWarning, match="these calls run without a graph") as caught:
            capture = self.compare(Configured, loss)
        assert len(caught) == 1
        assert capture.recorded == 1
        assert capture.replayed == 23

    def test_a_hook_around_a_call(self) -> None:
        found = []

        def loss(net: nn.Module, step: int) -> Tensor:
            handle = net[3].register_forward_hook(lambda *args: found.append(args[-1].sum())) if step > 2 else None
            output = net(inputs(2, 4, seed=step)).square().mean()
            if handle is not None:
                handle.remove()
                output = output + found.pop()
            return output

        with pytest.warns(UserWarning, match="these calls run without a graph"):
            self.compare(mlp, loss)

    def test_a_hook_that_is_a_value(self) -> None:
        def loss(net: nn.Module, step: int) -> Tensor:
            with net[3].register_forward_hook(Times(1.0 + step // 3)):
                return net(inputs(2, 4, seed=step)).square().mean()

        assert self.compare(mlp, loss).recorded == 2

    @pytest.mark.parametrize("is_emptied", [False, True])
    def test_a_cache_of_what_was_computed_from_weights(self, is_emptied: bool) -> None:
        """The one that is filled during an evaluation is undone afterwards, and knows only its perturbation."""
        with pytest.warns(UserWarning, match="changes what its modules hold") if is_emptied else nullcontext():
            capture = self.compare(
                Cached,
                lambda net, step: net(inputs(2, 4, seed=step)).square().mean(),
                lambda net, _: net.cache.clear() if is_emptied else None,
            )
        assert capture.recorded == (0 if is_emptied else 1)

    @pytest.mark.parametrize(
        "change",
        [
            lambda net: setattr(net.config, "scale", 2.0),
            lambda net: net.pair[1].__setitem__(0, 2.0),
            lambda net: net.on_the_host.fill_(2.0),
        ],
        ids=["config", "list_in_a_tuple", "number_on_the_host"],
    )
    def test_settings_that_change_in_mid_run(self, change: Callable[[nn.Module], Any]) -> None:
        capture = self.compare(
            Configured,
            lambda net, step: net(inputs(2, 4, seed=step)).square().mean(),
            lambda net, step: change(net) if step == 4 else None,
        )
        assert capture.recorded == 2

    def test_a_submodule_that_is_exchanged(self) -> None:
        capture = self.compare(
            mlp,
            lambda net, step: net(inputs(2, 4, seed=step)).square().mean(),
            lambda net, step: net.__setitem__(2, nn.Sigmoid()) if step == 4 else None,
        )
        assert capture.recorded == 2

    def test_a_network_with_a_forward_of_its_own(self) -> None:
        def patched() -> nn.Module:
            net = mlp()
            net.forward = net.forward
            return net

        capture = self.compare(patched, lambda net, step: net(inputs(2, 4, seed=step)).square().mean())
        assert capture.recorded == 1
