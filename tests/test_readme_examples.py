"""The classes that the package's document defines do what it says of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from documents import PACKAGE, run_python
from zolightning.callbacks import ZerothOrder
from zolightning.callbacks.refusals import refuse_strategy
from zolightning.evaluation.mode import evaluation_mode
from zolightning.optim import MeZO
from zolightning.rewards.reward import rewards_of


@pytest.fixture
def examples(
    make_regression: Callable[..., L.LightningModule],
    regression_data: Callable[..., DataLoader],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> SimpleNamespace:
    monkeypatch.chdir(tmp_path)
    found = run_python(PACKAGE, make_regression, regression_data(), monkeypatch)
    monkeypatch.undo()  # Trainers of the tests take as many steps as they say
    return SimpleNamespace(**found)


def test_the_method_moves_by_its_formula(examples: SimpleNamespace) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net, inputs = nn.Linear(3, 2), torch.randn(5, 3)
    optimizer = examples.FZOO(net.named_parameters(), lr=1e-2, num_queries=4, seed=3)
    optimizer.attach(net)
    before = net.weight.detach().clone()
    record = optimizer.estimate(lambda: net(inputs).square().mean())
    unperturbed, losses = record.losses[0], torch.tensor(record.losses[1:], dtype=torch.float64)
    assert unperturbed == pytest.approx(net(inputs).square().mean().item(), rel=1e-6)
    signs = []
    for query in range(4):
        directions = optimizer.directions(optimizer.param_groups[0], record.seed, record.step, {query: 1.0})
        directions[net.weight].accumulate(sign := torch.zeros(2, 3))
        signs.append(sign)
    optimizer.step()
    mean = sum((loss - unperturbed) * sign for loss, sign in zip(losses, signs, strict=True)) / 4
    torch.testing.assert_close(net.weight, (before - 1e-2 * mean / losses.std()).float(), rtol=0, atol=1e-6)
    assert (net.weight - before).abs().max() > 1e-3


def test_the_low_rank_method_moves_by_its_formula(examples: SimpleNamespace) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net, inputs = nn.Linear(5, 3), torch.randn(7, 5)
    optimizer = examples.SignLOZO(net.named_parameters(), lr=0.01, seed=3, noise="rademacher")
    optimizer.attach(net)
    before, factor = net.weight.detach().clone(), optimizer.basis(net.weight).right
    record = optimizer.estimate(lambda: net(inputs).square().mean())
    optimizer.step()
    core = (net.weight.detach() - before) @ torch.linalg.pinv(factor).T / -0.01
    torch.testing.assert_close(core, optimizer.core_gradient(net.weight, record).sign(), rtol=0, atol=1e-4)
    assert core.abs().min() > 0.99  # random signs are never 0


def test_the_sign_method_moves_by_its_formula(examples: SimpleNamespace) -> None:
    net, before = nn.Linear(3, 2), torch.full((2, 3), 0.25)
    net.weight.data.copy_(before)
    optimizer = examples.ZOSignSGD(net.named_parameters(), lr=0.125, noise="rademacher", seed=3)
    optimizer.attach(net)
    record = optimizer.estimate(lambda: net(torch.ones(1, 3)).square().mean())
    direction = optimizer.directions(optimizer.param_groups[0], record.seed, record.step, {0: 1.0})[net.weight]
    optimizer.step()
    sign = (record.projected_grads[0] * direction.of_elements(torch.zeros(6))).sign().view(2, 3)
    assert torch.equal(net.weight, before - 0.125 * sign)


def test_the_layerwise_method_is_mezo_with_other_directions(examples: SimpleNamespace) -> None:
    nets = [nn.Linear(3, 2).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    moves = []
    for net, method in zip(nets, (MeZO, examples.LayerwiseMeZO), strict=True):
        before = [parameter.detach().clone() for parameter in net.parameters()]
        optimizer = method(net.named_parameters(), lr=1e-2, seed=3)
        optimizer.attach(net)
        record = optimizer.estimate(lambda net=net: net.weight.sum() + net.bias.sum())
        optimizer.step()
        moves.append([(p - b) / record.projected_grads[0] for p, b in zip(net.parameters(), before, strict=True)])
    (weight, bias), (same_weight, farther_bias) = moves
    torch.testing.assert_close(same_weight, weight, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(farther_bias, 3 * bias, rtol=1e-6, atol=1e-9)


def test_the_line_search_takes_the_best_step(examples: SimpleNamespace) -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float64))
    found = {}
    for lr in (0.05, 0.25, 1.0):  # for the loss p ** 2 / 2 and signs as directions a rate of 1 goes to the minimum
        parameter.data.fill_(1.0)
        optimizer = MeZO([parameter], lr=lr, noise="rademacher", estimator=examples.LineSearch(), seed=0)
        record = optimizer.estimate(lambda: parameter.square().sum() / 2)
        optimizer.step()
        found[lr] = parameter.item()
        assert record.forward_passes == 5 and len(record.losses) == 2
    assert found == pytest.approx({0.05: 0.8, 0.25: 0.0, 1.0: 0.0}, abs=1e-5)


def test_the_method_learns_under_a_trainer(
    examples: SimpleNamespace, make_trainer: Any, make_regression: Any, regression_data: Any
) -> None:
    module = make_regression()

    @torch.no_grad()
    def loss() -> float:
        with evaluation_mode(module):
            return sum(module.training_step(batch, 0).item() for batch in regression_data())

    before = loss()
    make_trainer(max_steps=200, callbacks=[ZerothOrder(partial(examples.FZOO, lr=2e-2))]).fit(module, regression_data())
    assert loss() < 0.5 * before


def test_the_scope_trains_what_it_names(
    examples: SimpleNamespace, make_trainer: Any, make_regression: Any, regression_data: Any
) -> None:
    module = make_regression()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    callbacks = [examples.Biases(), ZerothOrder(partial(MeZO, lr=1e-2))]
    make_trainer(max_steps=3, callbacks=callbacks).fit(module, regression_data())
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]) != name.endswith("bias"), name


def test_the_reward_is_one(examples: SimpleNamespace) -> None:
    assert rewards_of(examples.brevity, ["", "a b c"], [["x"], ["y"]]) == [1.0, 0.25]


def test_the_strategy_counts(examples: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DDPStrategy, "reduce", lambda self, tensor, group, reduce_op: 2 * tensor)
    strategy = examples.CountingDDP()
    refuse_strategy(strategy)
    assert torch.equal(strategy.reduce(torch.ones(2, 2), reduce_op="sum"), torch.full((2, 2), 2.0))
    assert strategy.sent == 4
