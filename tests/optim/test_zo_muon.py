"""ZO-Muon and Subspace-MeZO against restatements of their definitions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizer_steps import standard
from zolightning.kernels.noise import key
from zolightning.optim import SubspaceMeZO, ZOMuon
from zolightning.optim.estimators import Estimator, OneSided, TwoSided
from zolightning.optim.orthogonalization import msign, newton_schulz

STEPS, INTERVAL, RANK, QUERIES = 9, 4, 3, 3
SHAPES = [(8, 20), (20, 8), (5, 5)]


class Net(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.w = nn.Parameter(torch.randn(rows, columns, dtype=torch.float64, generator=draw))
        self.twin = nn.Parameter(torch.randn(rows, columns, dtype=torch.float64, generator=draw))
        self.v = nn.Parameter(torch.randn(5, dtype=torch.float64, generator=draw))

    def forward(self) -> Tensor:
        return (self.w - 1).square().sum() + (self.twin - 0.5).square().sum() / 2 + (self.v + 1).square().sum()

    def at(self, weights: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return torch.func.functional_call(self, weights, ()).item()


def follow(net: Net, optimizer: SubspaceMeZO | ZOMuon, orthogonalize: Any, vector_lr: float) -> dict[str, Tensor]:
    """Trains `net`, and does the same in plain arithmetic; returns the weights of that."""
    weights = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    group = optimizer.param_groups[0]
    lr, eps, momentum = group["lr"], group["eps"], group["momentum"]
    means: dict[str, Any] = dict.fromkeys(weights, 0.0)
    for step in range(STEPS):
        if step and step % INTERVAL == 0:
            optimizer.resample()
            means = {name: mean if name == "v" else 0.0 for name, mean in means.items()}
        bases = {name: optimizer.basis(getattr(net, name)).left for name in ("w", "twin")}
        gradients: dict[str, Any] = dict.fromkeys(weights, 0.0)
        for query in range(optimizer.num_queries):
            rank = bases["w"].shape[1]
            shapes = {name: w.shape if name == "v" else (rank, w.shape[1]) for name, w in weights.items()}
            z = {name: standard(shape, key(0, step, query, name)).double() for name, shape in shapes.items()}
            lifted = {name: bases[name] @ z[name] if name in bases else z[name] for name in z}
            plus, minus = (net.at({n: w + s * eps * lifted[n] for n, w in weights.items()}) for s in (1, -1))
            if isinstance(optimizer.estimator, OneSided):
                g = (plus - net.at(weights)) / eps
            else:
                g = (plus - minus) / (2 * eps)
            gradients = {name: gradients[name] + g * z[name] / optimizer.num_queries for name in z}
        means = {name: momentum * means[name] + (1 - momentum) * gradients[name] for name in weights}
        for name in bases:
            weights[name] = weights[name] - lr * bases[name] @ orthogonalize(means[name])
        weights["v"] = weights["v"] - vector_lr * means["v"]
        optimizer.estimate(net)
        optimizer.step()
    optimizer.detach()
    return weights


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("orthogonalization", ["newton_schulz", "svd"])
@pytest.mark.parametrize("estimator", [TwoSided(), OneSided()])
def test_zo_muon_with_new_bases(shape: tuple[int, int], orthogonalization: str, estimator: Estimator) -> None:
    """Every query of a step right after new bases counts, in the basis it was evaluated in."""
    net = Net(*shape)
    optimizer = ZOMuon(
        net.named_parameters(),
        lr=0.05,
        eps=1e-2,
        rank=RANK,
        vector_lr=0.01,
        orthogonalization=orthogonalization,
        num_queries=QUERIES,
        estimator=estimator,
    )
    expected = follow(net, optimizer, msign if orthogonalization == "svd" else newton_schulz, 0.01)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_subspace_mezo_with_new_bases(momentum: float) -> None:
    net = Net(8, 6)
    optimizer = SubspaceMeZO(net.named_parameters(), lr=0.01, eps=1e-2, rank=RANK, momentum=momentum, num_queries=2)
    optimizer.param_groups[0]["transport"] = "reset"
    expected = follow(net, optimizer, lambda core: core, 0.01)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-4)


class TestMove:
    @pytest.fixture
    def moved(self) -> tuple[Tensor, Tensor, float]:
        net, lr = Net(24, 40), 0.05
        optimizer = ZOMuon(net.named_parameters(), lr=lr, rank=8)
        before, left = net.w.detach().clone(), optimizer.basis(net.w).left
        optimizer.estimate(net)
        optimizer.step()
        optimizer.detach()
        return net.w.detach() - before, left, lr

    def test_lies_in_the_span_of_the_basis(self, moved: tuple[Tensor, Tensor, float]) -> None:
        move, left, _ = moved
        assert (move - left @ left.T @ move).norm() < 1e-6 * move.norm()

    def test_has_the_learning_rate_as_its_singular_values(self, moved: tuple[Tensor, Tensor, float]) -> None:
        move, left, lr = moved
        values = torch.linalg.svdvals(left.T @ move / lr)
        assert len(values) == 8 and values.min() > 0.6 and values.max() < 1.25


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_scale_of_the_loss_does_not_matter(momentum: float) -> None:
    moved = []
    for scale in (1.0, 16.0):
        net = Net(8, 20)
        optimizer = ZOMuon(net.named_parameters(), lr=0.05, rank=RANK, momentum=momentum, vector_lr=0.0)
        for _ in range(5):
            optimizer.estimate(lambda net=net, scale=scale: scale * net())
            optimizer.step()
        optimizer.detach()
        moved.append((net.w.detach(), net.v.detach()))
    torch.testing.assert_close(moved[0][0], moved[1][0], rtol=0, atol=1e-9)
    assert torch.equal(moved[0][1], Net(8, 20).v)  # no learning rate, no move


def test_schedules_scale_the_learning_rate_of_vectors_too() -> None:
    moved = []
    for factor in (1.0, 0.25):
        net = Net(8, 20)
        optimizer = ZOMuon(net.named_parameters(), lr=0.05, rank=RANK, vector_lr=1e-3)
        optimizer.param_groups[0]["lr"] *= factor
        optimizer.estimate(net)
        optimizer.step()
        moved.append(net.v.detach() - Net(8, 20).v.detach())
    torch.testing.assert_close(0.25 * moved[0], moved[1], rtol=1e-5, atol=0)
    assert moved[0].any()


def test_a_rank_of_all_rows_sees_all_of_the_gradient() -> None:
    w = nn.Parameter(torch.zeros(6, 9))
    left = ZOMuon([w], rank=99).basis(w).left
    torch.testing.assert_close(left @ left.T, torch.eye(6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [SubspaceMeZO, ZOMuon])
def test_memory(method: type[SubspaceMeZO | ZOMuon]) -> None:
    """P, (m, r) in the weight's dtype, and the pending core, (r, n) in fp32."""
    net = nn.Linear(512, 256, bias=False).bfloat16()
    optimizer = method(net.named_parameters(), rank=16, update_precision="native")
    optimizer.fold_every_step = False
    optimizer.estimate(lambda: net(torch.ones(2, 512, dtype=torch.bfloat16)).float().square().mean())
    optimizer.step()
    assert optimizer.state_bytes() == 256 * 16 * 2 + 16 * 512 * 4


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="`orthogonalization` must"):
        ZOMuon([nn.Parameter(torch.ones(3, 3))], orthogonalization="qr")
