"""The evaluator generates no noise where nothing is perturbed, and no key more than once a step."""

from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from zolightning.directions import dense
from zolightning.directions.dense import Direction
from zolightning.optim import MeZO
from zolightning.optim.estimators import OneSided, TwoSided


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def loss_of(net: nn.Module) -> Tensor:
    return net(torch.ones(4, 3)).square().mean()


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[Direction]:
    """All directions that have been added to a weight so far."""
    found: list[Direction] = []
    own = Direction.add_to

    def spy(self: Direction, weight: Tensor, out: Tensor, start: int = 0) -> None:
        found.append(self)
        own(self, weight, out, start)

    monkeypatch.setattr(Direction, "add_to", spy)
    return found


def test_a_baseline_evaluation_reads_the_stored_weights(net: nn.Module, writes: list[Direction]) -> None:
    optimizer = MeZO(net.named_parameters(), num_queries=2, estimator=OneSided(), seed=0)
    optimizer.attach(net)
    optimizer.estimate(partial(loss_of, net))
    writes.clear()
    record = optimizer.estimate(partial(loss_of, net))
    assert len(writes) == 2 * len(list(net.parameters()))  # of two queries; three losses
    assert record.losses[0] == loss_of(net).item()


def test_in_place_parameters_are_left_alone_by_a_baseline(net: nn.Module, writes: list[Direction]) -> None:
    net.unused = nn.Parameter(torch.ones(3))
    versions = []

    def loss() -> Tensor:
        versions.append(net.unused._version)
        return net[2](net[1](net[0](torch.ones(4, 3)))).square().mean()

    optimizer = MeZO(net.named_parameters(), estimator=OneSided(), seed=0)
    optimizer.attach(net)
    with pytest.warns(UserWarning, match="perturbed in place"):
        optimizer.estimate(loss)
    versions.clear()
    before = net.unused._version
    optimizer.estimate(loss)
    assert versions[0] == before and versions[1] > before


def test_a_loss_that_writes_to_a_weight_in_a_later_step_is_refused(net: nn.Module) -> None:
    net.unused = nn.Parameter(torch.ones(3))
    optimizer = MeZO(net.named_parameters(), seed=0)
    optimizer.attach(net)

    def loss() -> Tensor:
        if optimizer.param_groups[0]["step"] == 2:
            net[2].weight.clamp_(-0.1, 0.1)
        return net[2](net[1](net[0](torch.ones(4, 3)))).square().mean()

    with pytest.warns(UserWarning, match="perturbed in place"):
        optimizer.estimate(loss)
    optimizer.step()
    optimizer.estimate(loss)
    optimizer.step()
    with pytest.raises(ValueError, match=r"`2\.weight` is changed by the evaluation of the loss itself"):
        optimizer.estimate(loss)


@pytest.mark.parametrize("num_queries", [1, 3])
def test_keys_are_hashed_once_a_step(net: nn.Module, monkeypatch: pytest.MonkeyPatch, num_queries: int) -> None:
    hashed: list[tuple[int, int, int, str]] = []
    own: Callable[..., list[tuple[int, int]]] = dense.keys_of

    def spy(names: Iterable[str], *run: int) -> list[tuple[int, int]]:
        names = list(names)
        hashed.extend((*run, name) for name in names)
        return own(names, *run)

    optimizer = MeZO(net.named_parameters(), num_queries=num_queries, estimator=TwoSided(), seed=1000 + num_queries)
    optimizer.attach(net)
    optimizer.estimate(partial(loss_of, net))
    optimizer.step()
    monkeypatch.setattr(dense, "keys_of", spy)
    optimizer.estimate(partial(loss_of, net))
    optimizer.step()
    names = [name for name, _ in net.named_parameters()]
    assert sorted(hashed) == sorted(
        (1000 + num_queries, 1, query, name) for query in range(num_queries) for name in names
    )


def test_a_dense_method_has_the_direction_of_each_query(net: nn.Module) -> None:
    """``W - lr * mean(g z)`` from single directions is what the method does with their sum."""
    optimizer = MeZO(net.named_parameters(), lr=0.1, num_queries=3, seed=2)
    optimizer.attach(net)
    record = optimizer.estimate(partial(loss_of, net))
    expected = {parameter: parameter.detach().clone() for parameter in net.parameters()}
    for query, grad in enumerate(record.projected_grads):
        for parameter, z in optimizer.directions(optimizer.param_groups[0], 2, 0, {query: 1.0}).items():
            direction = torch.zeros_like(parameter)
            z.accumulate(direction)
            expected[parameter] -= 0.1 * grad / 3 * direction
    optimizer.step()
    for parameter, value in expected.items():
        torch.testing.assert_close(parameter.detach(), value)
