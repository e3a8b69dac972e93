"""A method trains in a plain loop of torch's and in one of Fabric's: an estimate, a step, now and then a resampling."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimizer_steps import assert_same, weights
from zolightning.optim import LOZO, MeZO, SubZero, ZerothOrderOptimizer

Method = Callable[..., ZerothOrderOptimizer]

METHODS = {
    "mezo": partial(MeZO, lr=0.02, num_queries=4, seed=0),
    "lozo": partial(LOZO, lr=0.01, rank=2, num_queries=4, seed=0),
    "subzero": partial(SubZero, lr=0.02, rank=3, vector_lr=0.02, num_queries=4, seed=0),
}
INPUTS = torch.randn(16, 4, generator=torch.Generator().manual_seed(3))
TARGETS = INPUTS @ torch.tensor([[0.5], [-1.0], [0.25], [0.1]])


def make_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))


def loss_of(net: nn.Module) -> Tensor:
    return F.mse_loss(net(INPUTS), TARGETS)


def plain(method: Method, steps: int) -> tuple[nn.Module, list[float]]:
    net, losses = make_net(), []
    optimizer = method(net.named_parameters())
    optimizer.attach(net)
    for step in range(steps):
        if step % 5 == 4 and hasattr(optimizer, "resample"):
            optimizer.resample()
        losses.append(optimizer.estimate(lambda: loss_of(net)).loss)
        optimizer.step()
    assert all(module.training for module in net.modules())
    optimizer.detach()
    return net, losses


@pytest.mark.parametrize("name", METHODS)
class TestLoops:
    def test_torch(self, name: str) -> None:
        _, losses = plain(METHODS[name], 150)
        assert sum(losses[-10:]) < 0.5 * sum(losses[:10])

    @pytest.mark.parametrize("estimate", ["wrapped", "raw"])
    @pytest.mark.parametrize("step", ["wrapped", "raw"])
    def test_fabric_does_the_same_by_every_handle(self, name: str, estimate: str, step: str) -> None:
        fabric = L.Fabric(accelerator="cpu", devices=1)
        net = make_net()
        raw = METHODS[name](net.named_parameters())
        raw.attach(net)
        module, wrapped = fabric.setup(net, raw)
        handles: dict[str, Any] = {"raw": raw, "wrapped": wrapped}
        losses = []
        for number in range(12):
            if number % 5 == 4 and hasattr(wrapped, "resample"):
                wrapped.resample()
            losses.append(handles[estimate].estimate(lambda: loss_of(module)).loss)
            handles[step].step()
        assert raw.record is wrapped.record and raw.record.step == 11
        assert all(submodule.training for submodule in net.modules())
        wrapped.detach()
        expected, expected_losses = plain(METHODS[name], 12)
        assert losses == expected_losses
        assert_same(weights(net), weights(expected))


class TestStepWithoutAnEstimate:
    def test_it_says_what_to_do(self) -> None:
        net = make_net()
        optimizer = MeZO(net.named_parameters())
        optimizer.attach(net)
        with pytest.raises(RuntimeError, match=r"^MeZO.step\(\) has no estimate to apply.*callback ZerothOrder.*$"):
            optimizer.step()
        optimizer.estimate(lambda: loss_of(net))
        optimizer.step()
        with pytest.raises(RuntimeError, match="no estimate"):
            optimizer.step()

    def test_a_loop_made_for_gradients(self) -> None:
        net = make_net()
        optimizer = MeZO(net.named_parameters())
        with pytest.raises(RuntimeError, match="reads no gradients"):
            loss_of(net).backward(), optimizer.step()
        with pytest.raises(RuntimeError, match="reads no gradients"):
            optimizer.step(lambda: loss_of(net))

    def test_the_callback_is_forgotten(self, make_trainer: Any, make_regression: Any, regression_data: Any) -> None:
        module = make_regression()
        module.configure_optimizers = lambda: MeZO(module.parameters())
        with pytest.raises(RuntimeError, match="use the callback ZerothOrder"):
            make_trainer(max_steps=2).fit(module, regression_data())

    def test_an_estimate_that_fails_leaves_nothing_to_apply(self) -> None:
        net = make_net()
        optimizer = MeZO(net.named_parameters())
        optimizer.attach(net)
        optimizer.estimate(lambda: loss_of(net))
        with pytest.raises(ZeroDivisionError):
            optimizer.estimate(lambda: 1 / 0)
        with pytest.raises(RuntimeError, match="no estimate"):
            optimizer.step()
