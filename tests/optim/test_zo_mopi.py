"""ZO-MOPI against a restatement of its definition."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimizer_steps import standard
from zolightning.kernels.noise import key
from zolightning.optim import ZOMOPI
from zolightning.optim.estimators import OneSided

STEPS, INTERVAL, RANK, K = 9, 4, 4, 2


class Net(nn.Module):
    def __init__(self, rows: int = 8, columns: int = 20) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.w = nn.Parameter(torch.randn(rows, columns, dtype=torch.float64, generator=draw))
        self.v = nn.Parameter(torch.randn(5, dtype=torch.float64, generator=draw))

    def forward(self) -> Tensor:
        return ((self.w - 1).square() * torch.linspace(0.5, 2, self.w.shape[1])).sum() + (self.v + 1).square().sum()

    def at(self, w: Tensor, v: Tensor) -> float:
        with torch.no_grad():
            return torch.func.functional_call(self, {"w": w, "v": v}, ()).item()


def train(net: Net, optimizer: ZOMOPI, steps: int = STEPS) -> Net:
    for step in range(steps):
        if step and step % INTERVAL == 0:
            optimizer.resample()
        optimizer.estimate(net)
        optimizer.step()
    optimizer.detach()
    return net


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_method_with_new_bases(shape: tuple[int, int], momentum: float) -> None:
    """The paper's algorithm: two-sided queries, momentum carried into new bases (equation 11), V kept."""
    net, lr, eps, vector_lr, queries = Net(*shape), 0.05, 1e-2, 0.01, 3
    w, v = net.w.detach().clone(), net.v.detach().clone()
    optimizer = ZOMOPI(net.named_parameters(), lr, eps, RANK, K, momentum, vector_lr, queries)
    m: Any = 0.0
    m_vector: Any = 0.0
    old = right = None
    for step in range(STEPS):
        if step and step % INTERVAL == 0:
            optimizer.resample()
        a = optimizer.basis(net.w).left
        if old is not None and momentum:
            m = a.T @ old @ m
        old, estimate, estimate_vector = a, 0.0, 0.0
        for query in range(queries):
            b = standard((RANK, shape[1]), key(0, step, query, "w")).double()
            z = standard((5,), key(0, step, query, "v")).double()
            g = (net.at(w + eps * a @ b, v + eps * z) - net.at(w - eps * a @ b, v - eps * z)) / (2 * eps)
            estimate, estimate_vector = estimate + g * b / queries, estimate_vector + g * z / queries
        m, m_vector = momentum * m + (1 - momentum) * estimate, momentum * m_vector + (1 - momentum) * estimate_vector
        if right is None:
            right = torch.linalg.svd(m, full_matrices=False).Vh[:K].T
        right = torch.linalg.qr(m.T @ (m @ right)).Q
        w, v = w - lr * a @ F.normalize(m @ right, dim=0) @ right.T, v - vector_lr * m_vector
        optimizer.estimate(net)
        optimizer.step()
    optimizer.detach()
    torch.testing.assert_close(net.w.detach(), w, rtol=0, atol=2e-4)
    torch.testing.assert_close(net.v.detach(), v, rtol=0, atol=2e-4)


@pytest.mark.parametrize("power_rank", [1, 3, RANK])
def test_a_move_has_rank_and_length_of_its_definition(power_rank: int) -> None:
    net, lr = Net(), 0.05
    before = net.w.detach().clone()
    optimizer = ZOMOPI(net.named_parameters(), lr=lr, rank=RANK, power_rank=power_rank)
    left = optimizer.basis(net.w).left
    train(net, optimizer, steps=1)
    moved = net.w.detach() - before
    assert moved.norm().item() == pytest.approx(lr * power_rank**0.5, rel=1e-5)
    assert torch.linalg.matrix_rank(moved, rtol=1e-6) == power_rank
    assert (moved - left @ left.T @ moved).norm() < 1e-6 * moved.norm()


def test_the_scale_of_the_loss_does_not_matter() -> None:
    weights = []
    for scale in (1.0, 64.0):
        net = Net()
        optimizer = ZOMOPI(net.named_parameters(), lr=0.05, rank=RANK, power_rank=K, vector_lr=0.0)
        for _ in range(6):
            optimizer.estimate(lambda net=net, scale=scale: scale * net())
            optimizer.step()
        optimizer.detach()
        weights.append(net.w.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-9)


def test_one_sided_and_two_sided_agree_as_eps_shrinks() -> None:
    """The forward difference is off by (eps / 2) z' H z: a hundredth of the eps, a hundredth of the difference."""
    differences = []
    for eps in (1e-2, 1e-4):
        options = {"eps": eps, "rank": RANK, "power_rank": K, "lr": 0.01}
        two, one = Net(), Net()
        train(two, ZOMOPI(two.named_parameters(), **options), steps=1)
        train(one, ZOMOPI(one.named_parameters(), estimator=OneSided(), **options), steps=1)
        differences.append((one.w - two.w).norm().item())
    assert 0 < differences[1] < 0.02 * differences[0]


@pytest.mark.filterwarnings("ignore:2 parameters are unused", "ignore:All losses of a step were equal")
def test_a_flat_loss_moves_nothing_and_leaves_no_nan() -> None:
    net = Net()
    optimizer = ZOMOPI(net.named_parameters(), rank=RANK, power_rank=K)
    optimizer.fold_every_step = False
    for _ in range(3):
        optimizer.estimate(lambda: torch.tensor(2.0))
        optimizer.step()
    assert torch.equal(optimizer.state[net.w]["core"], torch.zeros(RANK, 20, dtype=torch.float64))
    train(net, optimizer, steps=2)
    assert net.w.isfinite().all() and not torch.equal(net.w, Net().w)


def test_memory() -> None:
    """A, (m, r) in the weight's dtype; pending core and M, (r, n), and V, (n, k), in fp32."""
    net = nn.Linear(512, 256, bias=False).bfloat16()
    optimizer = ZOMOPI(net.named_parameters(), rank=16, power_rank=4, update_precision="native")
    optimizer.fold_every_step = False
    optimizer.estimate(lambda: net(torch.ones(2, 512, dtype=torch.bfloat16)).float().square().mean())
    optimizer.step()
    assert optimizer.state_bytes() == 256 * 16 * 2 + 2 * 16 * 512 * 4 + 512 * 4 * 4


@pytest.mark.parametrize("value", [0, -1, 65])
def test_bad_values(value: int) -> None:
    with pytest.raises(ValueError, match="`power_rank` must"):
        ZOMOPI([nn.Parameter(torch.ones(3, 3))], power_rank=value)
