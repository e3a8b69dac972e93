"""What a schedule asks its order, and tells it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from zolightning.blocks import Blocks, BlockSchedule, Cyclic, Order, find_blocks
from zolightning.optim import MeZO


@pytest.fixture
def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.fixture
def blocks(net: nn.Sequential) -> Blocks:
    return find_blocks(net, net.parameters(), patterns=["0", "1"])


@pytest.fixture
def optimizer(net: nn.Sequential) -> MeZO:
    optimizer = MeZO(net.named_parameters(), lr=1e-2, num_queries=3)
    optimizer.attach(net)
    return optimizer


def test_an_order_learns_the_mean_square_of_a_visit(net: nn.Sequential, blocks: Blocks, optimizer: MeZO) -> None:
    class Learning(Cyclic):
        def learn(self, blocks: Any, squared_grad: float, alone: Any) -> None:
            learned.append((*blocks, squared_grad))

    learned: list[tuple[float, ...]] = []
    squares = []
    BlockSchedule(blocks, Learning(), interval=2).attach(optimizer)
    for inputs in torch.eye(5, 3):
        record = optimizer.estimate(lambda inputs=inputs: net(inputs).square().sum())
        squares.append(np.square(record.projected_grads).mean())
        optimizer.step()
    assert learned == [(0, pytest.approx(sum(squares[:2]) / 2)), (1, pytest.approx(sum(squares[2:4]) / 2))]


def test_an_order_is_told_the_norms_of_blocks(net: nn.Sequential, blocks: Blocks, optimizer: MeZO) -> None:
    class Asking(Order):
        def choose(self, turn: Any) -> list[int]:
            told.extend(map(turn.norm, range(turn.num_blocks)))
            return [0]

    told: list[float] = []
    BlockSchedule(blocks, Asking()).attach(optimizer)
    optimizer.estimate(lambda: net(torch.ones(1, 3)).sum())
    weights = [torch.cat([parameter.detach().flatten() for parameter in layer.parameters()]) for layer in net]
    assert told == pytest.approx([weight.norm().item() for weight in weights])
