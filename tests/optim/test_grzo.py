"""GRZO against its definition: one core, signs of each example, and steps over the spread of a batch."""

import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from zolightning.directions.basis import Basis
from zolightning.directions.dense import Direction, directions
from zolightning.directions.signed import Signed
from zolightning.evaluation.examples import MicroBatch
from zolightning.optim import GRZO
from zolightning.optim.estimators import TwoSided


def test_directions_share_a_core_up_to_signs_and_a_step_adds_them_up() -> None:
    net = nn.Linear(5, 4, bias=False).double()
    inputs, targets = torch.randn(3, 5).double(), torch.randn(3, 4).double()

    def loss(rows: slice = slice(None)) -> torch.Tensor:
        return (net(inputs[rows]) - targets[rows]).square().mean()

    lr, eps, weight = 0.1, 1e-3, net.weight.detach().clone()
    optimizer = GRZO(net.named_parameters(), lr=lr, eps=eps, rank=2, num_queries=3, seed=3, noise="rademacher")
    optimizer.attach(net)
    right = optimizer.basis(net.weight).right
    cores = []
    for query in range(3):
        moved = torch.empty(4, 5).double()
        optimizer.perturbations(query, 1)[net.weight].add_to(weight, moved)
        core = torch.linalg.lstsq(right, (moved - weight).T / eps).solution.T
        torch.testing.assert_close(core @ right.T, (moved - weight) / eps)
        cores.append(core)
    for core in cores[1:]:
        signs = core / cores[0]
        torch.testing.assert_close(signs, signs[:, :1] * signs[:1] * signs[0, 0])  # an outer product
        torch.testing.assert_close(signs.abs(), torch.ones(4, 2).double())
    batch = MicroBatch(loss, {e: partial(loss, slice(e, e + 1)) for e in range(3)})
    record = optimizer.estimate(loss, micro_batches=[batch])
    slopes = [((weight @ x - t) * 2 / 4)[:, None] * x for x, t in zip(inputs, targets, strict=True)]
    expected = [(slope * (core @ right.T)).sum().item() for slope, core in zip(slopes, cores, strict=True)]
    assert record.projected_grads == pytest.approx(expected, rel=1e-6)
    step = sum(g * core @ right.T for g, core in zip(expected, cores, strict=True)) / 3 / statistics.stdev(expected)
    optimizer.step()
    torch.testing.assert_close(net.weight.detach(), weight - lr * step, rtol=1e-5, atol=1e-6)
    gradient = sum(g * core for g, core in zip(expected, cores, strict=True)) / 3
    torch.testing.assert_close(optimizer.core_gradient(net.weight, record), gradient, rtol=1e-5, atol=1e-6)


def test_equal_projected_gradients_have_no_spread_and_move_nothing() -> None:
    """As those that are clipped at one bound, or those of an accuracy that changes alike for all examples."""
    net = nn.Linear(5, 4)
    optimizer = GRZO(net.named_parameters(), lr=0.1, rank=2, num_queries=3, clip=1.5, estimator=TwoSided())
    optimizer.attach(net)
    record = optimizer.estimate(lambda: net(torch.ones(5)).square().sum())
    optimizer.step()
    assert max(map(abs, record.projected_grads)) < 70
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer.apply(replace(record, step=1, projected_grads=(90.0, 80.0, 70.0)))
    assert all(map(torch.equal, net.parameters(), before))


def test_noise_of_matrices_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(5, 4)
    optimizer = GRZO(net.named_parameters(), rank=2, num_queries=3)
    optimizer.attach(net)
    asked: list[str] = []

    def recording(named: dict[str, nn.Parameter], *arguments: Any) -> dict[str, Direction]:
        asked.extend(named)
        return directions(named, *arguments)

    for module in ("drawn", "subspace"):
        monkeypatch.setattr(f"zolightning.optim.{module}.directions", recording)
    optimizer.perturbations_of(range(3), 1)
    assert asked == [*["bias"] * 3, "weight/shared", "weight/signs"]


@pytest.mark.parametrize("factors", [(0.5, 0.5), (0.5, -0.5)])
@pytest.mark.parametrize("pending", [None, torch.ones(4, 2)])
def test_cores_of_one_run_are_those_of_each(factors: tuple[float, float], pending: torch.Tensor | None) -> None:
    """Of perturbations with one sign, which are written at once, and with both."""
    core, signs = torch.randn(4, 2), torch.randint(2, (2, 6)) * 2 - 1
    basis = Basis(right=torch.randn(5, 2))
    groups = [Signed(basis, (4, 5), pending, core, *own) for own in zip(signs, factors, strict=True)]
    Signed.write_cores(groups, found := torch.empty(2, 4, 2))
    offset = torch.zeros(4, 2) if pending is None else pending
    expected = [offset + factor * core * torch.outer(s[:4], s[4:]) for s, factor in zip(signs, factors, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize(("argument", "value"), [("num_queries", 1), ("align_queries", True), ("rank", 0)])
def test_bad_values(argument: str, value: object) -> None:
    """Also with an estimator that would take them."""
    with pytest.raises(ValueError, match=f"`{argument}`"):
        GRZO([nn.Parameter(torch.ones(3, 3))], estimator=TwoSided(), **{argument: value})
