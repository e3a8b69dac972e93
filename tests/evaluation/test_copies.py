"""A loss that makes a copy of a network, of a teacher for one, copies what is perturbed, and the copy lasts."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks import values
from zolightning.optim import LOZO, MeZO


class Copying(nn.Module):
    """Its loss is that of a copy of its network where `copies` is given."""

    def __init__(self, copies: Callable[[nn.Module], nn.Module] | None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net, self.copies = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 1)), copies
        self.teacher: nn.Module | None = None

    def loss(self) -> Tensor:
        net = self.net if self.copies is None else self.copies(self.net)
        return net(values(3, 4)).square().mean()

    def taught(self) -> Tensor:
        if self.teacher is None:
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        return (self.net(values(3, 4)) - 2 * self.teacher(values(3, 4))).square().mean()


def losses_of(make_loss: Any, module: Copying, method: Any, **settings: Any) -> list[tuple[float, ...]]:
    optimizer, losses = method(module.net.named_parameters(), lr=0.1, seed=0), []
    optimizer.attach(module, **settings)
    for _ in range(3):
        losses.append(optimizer.estimate(make_loss).losses)
        optimizer.step()
    return losses


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
@pytest.mark.parametrize("method", [MeZO, LOZO])
def test_a_copy_is_of_the_perturbed_network(copies: Any, method: Any) -> None:
    plain, copying = Copying(None), Copying(copies)
    expected = losses_of(plain.loss, plain, method)
    # LOZO adds to the copied weights what it adds to outputs elsewhere: other last bits, 500 times as large in a step.
    assert losses_of(copying.loss, copying, method) == [pytest.approx(pair, rel=1e-4) for pair in expected]


@pytest.mark.parametrize("settings", [{}, {"evaluations_per_forward": 2}], ids=str)
def test_a_copy_that_stays_does_not_follow_the_network(settings: dict[str, Any]) -> None:
    module = Copying(None)
    losses_of(module.taught, module, MeZO, **settings)
    assert module.teacher is not None
    taught = module.teacher(values(3, 4))
    with torch.no_grad():
        for parameter in module.net.parameters():
            parameter.add_(1)
    assert torch.equal(module.teacher(values(3, 4)), taught)
    again = pickle.loads(pickle.dumps(module.teacher))
    assert torch.equal(again(values(3, 4)), taught)
