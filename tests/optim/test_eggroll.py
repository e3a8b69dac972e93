"""EGGROLL against its definition: low-rank directions of unit variance, one sum of outer products a step."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from zolightning.evaluation.examples import MicroBatch
from zolightning.optim import EGGROLL
from zolightning.optim.estimators import PerExample, TwoSided, ZScores

SHAPE = (24, 17)


def directions(optimizer: EGGROLL, weight: nn.Parameter, queries: int) -> Tensor:
    """The directions of a step, (queries, *shape), as evaluations see them."""
    zero = torch.zeros_like(weight)
    found = [torch.empty_like(weight) for _ in range(queries)]
    for query, out in enumerate(found):
        optimizer.perturbations(query, 1)[weight].add_to(zero, out)
    return torch.stack(found).detach() / optimizer.param_groups[0]["eps"]


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rank", [1, 3])
def test_directions_are_independent_have_the_rank_and_unit_variance(rank: int, noise: str) -> None:
    net = nn.Linear(*SHAPE[::-1], bias=False).double()
    optimizer = EGGROLL(net.named_parameters(), rank=rank, noise=noise)
    optimizer.attach(net)
    found = directions(optimizer, net.weight, 400)
    assert torch.linalg.matrix_rank(found[:20]).tolist() == [rank] * 20
    # The mean square of a product of factors has a variance below 9 (rank 1); some 400 x 17 of them are independent.
    assert found.square().mean().item() == pytest.approx(1.0, abs=0.1)
    flat = found.flatten(1) / SHAPE[0] ** 0.5 / SHAPE[1] ** 0.5
    products = flat @ flat.T - torch.eye(400).double() * flat.square().sum(1)
    # Inner products of independent directions have mean 0 and a standard deviation of 1 / sqrt(m n).
    deviation = products.square().sum().div(400 * 399).sqrt().item()
    assert deviation == pytest.approx((SHAPE[0] * SHAPE[1]) ** -0.5, rel=0.1)


def test_the_estimate_has_the_gradient_as_its_mean() -> None:
    net = nn.Linear(3, 2, bias=False).double()
    gradient = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]]).double()
    queries = 2_000
    optimizer = EGGROLL(net.named_parameters(), lr=1.0, num_queries=queries, estimator=TwoSided())
    optimizer.attach(net)
    found = directions(optimizer, net.weight, queries)
    mean = ((found * gradient).sum((1, 2), keepdim=True) * found).mean(0)
    # E[(g . E)^2 E_ij^2] of an outer product is at most 9 |g|^2
    torch.testing.assert_close(mean, gradient, rtol=0, atol=4 * 3 * gradient.norm().item() / queries**0.5)


@pytest.mark.parametrize("estimator", [None, TwoSided()])
def test_a_step_is_that_of_the_paper(estimator: TwoSided | None) -> None:
    net = nn.Linear(4, 5).double()  # taller than wide: neither factor has room for the other one's numbers
    inputs, targets = torch.randn(6, 4).double(), torch.randn(6, 5).double()
    lr, eps, queries = 0.1, 0.1, 5
    options = {"lr": lr, "eps": eps, "rank": 2, "num_queries": queries, "weight_decay": 0.3, "estimator": estimator}
    optimizer = EGGROLL(net.named_parameters(), **options)
    optimizer.attach(net)
    weight, bias = (parameter.detach().clone() for parameter in net.parameters())
    along, beside = directions(optimizer, net.weight, queries), directions(optimizer, net.bias, queries)

    def loss_at(scale: float, query: int) -> float:
        moved = F.linear(inputs, weight + scale * along[query], bias + scale * beside[query])
        return F.mse_loss(moved, targets).item()

    if estimator is None:
        losses = torch.tensor([loss_at(eps, query) for query in range(queries)]).double()
        scores = (losses - losses.mean()) / losses.std(correction=0)
    else:
        scores = torch.tensor([(loss_at(eps, q) - loss_at(-eps, q)) / (2 * eps) for q in range(queries)]).double()
    optimizer.estimate(lambda: F.mse_loss(net(inputs), targets))
    optimizer.step()
    step = (scores[:, None, None] * along).mean(0)
    torch.testing.assert_close(net.weight.detach(), weight * (1 - lr * 0.3) - lr * step, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(net.bias.detach(), bias - lr * (scores[:, None] * beside).mean(0), rtol=1e-5, atol=1e-8)


def test_half_precision_moves_as_float32_does() -> None:
    """Up to the rounding of float32: factors times coefficients are not rounded to the weight's dtype."""
    wide, half = nn.Linear(6, 5).bfloat16().float(), nn.Linear(6, 5).bfloat16()
    half.load_state_dict(wide.state_dict())
    one, other = (EGGROLL(net.named_parameters(), lr=0.1, rank=2, num_queries=3) for net in (wide, half))
    one.attach(wide)
    other.attach(half)
    other.apply(one.estimate(lambda: wide(torch.ones(1, 6)).square().sum()))
    one.step()
    for moved, rounded in zip(wide.parameters(), half.parameters(), strict=True):
        torch.testing.assert_close(other.completed(rounded), moved.detach().flatten(), rtol=1e-5, atol=1e-6)


class Both(nn.Module):
    """A table, a layer of each kind of product, and a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 12)
        self.conv = Conv1D(16, 12)
        self.linear = nn.Linear(16, 20)
        self.gain = nn.Parameter(torch.ones(20))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.conv(self.table(tokens))) * self.gain


@pytest.mark.parametrize("rows", [2, 64])  # thin products, and built weights
@pytest.mark.parametrize("estimator", [ZScores(), TwoSided()])
def test_queries_that_share_a_forward_have_the_losses_of_separate_ones(estimator: ZScores, rows: int) -> None:
    torch.manual_seed(0)
    net, tokens = Both().double(), torch.arange(rows * 3).view(rows, 3) % 7
    losses = []
    for together in (1, 4):
        optimizer = EGGROLL(net.named_parameters(), rank=2, num_queries=4, eps=0.1, estimator=estimator)
        optimizer.attach(net, evaluations_per_forward=together)
        losses.append(optimizer.estimate(lambda: net(tokens).square().mean()).losses)
        assert optimizer.evaluator.evaluations_per_forward == together
        optimizer.detach()
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_each_example_has_its_own_direction() -> None:
    net = nn.Linear(5, 4, bias=False).double()
    inputs, targets = torch.randn(3, 5).double(), torch.randn(3, 4).double()

    def loss(rows: slice = slice(None)) -> Tensor:
        return F.mse_loss(net(inputs[rows]), targets[rows])

    optimizer = EGGROLL(net.named_parameters(), num_queries=3, eps=1e-4, estimator=PerExample())
    optimizer.attach(net)
    along = directions(optimizer, net.weight, 3)
    batch = MicroBatch(loss, {e: partial(loss, slice(e, e + 1)) for e in range(3)})
    record = optimizer.estimate(loss, micro_batches=[batch])
    residuals = net(inputs).detach() - targets
    slopes = residuals[:, :, None] * inputs[:, None] * (2 / 4)
    assert record.projected_grads == pytest.approx((slopes * along).sum((1, 2)).tolist(), rel=1e-6)


@pytest.mark.parametrize(("argument", "value"), [("align_queries", True), ("rank", 0), ("clip", 1.0), ("noise", "")])
def test_bad_values(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"`{argument}`"):
        EGGROLL([nn.Parameter(torch.ones(3, 3))], **{argument: value})
