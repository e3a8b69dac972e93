"""SubZero against a restatement of its definition, and how it treats thin matrices."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizer_steps import standard
from zolightning.kernels.noise import key
from zolightning.optim import SubZero

STEPS, INTERVAL, RANK = 12, 4, 3


class Net(nn.Module):
    def __init__(self, rows: int = 8, columns: int = 6) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.w = nn.Parameter(torch.randn(rows, columns, dtype=torch.float64, generator=draw))
        self.v = nn.Parameter(torch.randn(5, dtype=torch.float64, generator=draw))

    def forward(self) -> Tensor:
        return (self.w - 1).square().sum() / 2 + (self.v + 1).square().sum()

    def at(self, w: Tensor, v: Tensor) -> float:
        with torch.no_grad():
            return torch.func.functional_call(self, {"w": w, "v": v}, ()).item()


@pytest.mark.parametrize(("scaling", "scale"), [("code", math.sqrt(48) / RANK), ("paper", 1.0)])
def test_the_method_with_new_bases(scaling: str, scale: float) -> None:
    net, lr, eps = Net(), 0.02, 1e-2
    w, v = net.w.detach().clone(), net.v.detach().clone()
    optimizer = SubZero(net.named_parameters(), lr=lr, eps=eps, rank=RANK, scaling=scaling, vector_lr=0.01)
    for step in range(STEPS):
        if step and step % INTERVAL == 0:
            optimizer.resample()
        basis = optimizer.basis(net.w)
        core, z = (standard(s, key(0, step, 0, n)).double() for s, n in (((RANK, RANK), "w"), ((5,), "v")))
        direction = scale * basis.left @ core @ basis.right.T
        rho = (net.at(w + eps * direction, v + eps * z) - net.at(w - eps * direction, v - eps * z)) / (2 * eps)
        w, v = w - lr * rho * direction, v - 0.01 * rho * z
        optimizer.estimate(net)
        optimizer.step()
    optimizer.detach()
    torch.testing.assert_close(net.w.detach(), w, rtol=0, atol=2e-5)
    torch.testing.assert_close(net.v.detach(), v, rtol=0, atol=2e-5)


def test_adam_on_the_core_is_torchs() -> None:
    """SubZero+: many one-sided queries in one subspace, Adam on the coefficients of the basis."""
    net, reference = Net(), Net()
    optimizer = SubZero([("w", net.w)], lr=0.02, rank=RANK, betas=(0.8, 0.95), scaling="paper", num_queries=2)
    basis, core = optimizer.basis(net.w), nn.Parameter(torch.zeros(RANK, RANK, dtype=torch.float64))
    adam = torch.optim.Adam([core], lr=0.02, betas=(0.8, 0.95), eps=1e-8)
    for step in range(STEPS):
        core.grad = torch.zeros_like(core)
        for query in range(2):
            z = standard((RANK, RANK), key(0, step, query, "w")).double()
            w = reference.w.detach() + basis.lift(core.detach())
            gradient = ((w - 1) * basis.lift(z)).sum()  # of a quadratic, where central differences are exact
            core.grad += gradient * z / 2
        adam.step()
        optimizer.estimate(net)
        optimizer.step()
    optimizer.detach()
    torch.testing.assert_close(net.w.detach(), reference.w.detach() + basis.lift(core.detach()), rtol=0, atol=5e-5)


def test_moves_stay_in_rows_and_columns_of_the_basis() -> None:
    net = Net()
    optimizer = SubZero(net.named_parameters(), lr=0.02, rank=RANK)
    before, basis = net.w.detach().clone(), optimizer.basis(net.w)
    for _ in range(4):
        optimizer.estimate(net)
        optimizer.step()
    optimizer.detach()
    moved = net.w.detach() - before
    assert (moved - basis.left @ basis.left.T @ moved).norm() < 1e-6 * moved.norm()
    assert (moved - moved @ basis.right @ basis.right.T).norm() < 1e-6 * moved.norm()


def test_directions_are_as_long_as_dense_ones() -> None:
    """``||s U Z V'||^2`` is m n on average; of 60 draws of 64 squares each the mean is good to 2.3 %."""
    w = nn.Parameter(torch.zeros(96, 40))
    optimizer = SubZero([w], rank=8, eps=1.0)
    out, total = torch.empty_like(w), 0.0
    for step in range(60):
        optimizer.param_groups[0]["step"] = step
        optimizer.perturbations(0, 1)[w].add_to(torch.zeros_like(w), out)
        total += out.square().sum().item() / 60
    assert total == pytest.approx(96 * 40, rel=0.1)


class TestThinMatrices:
    @pytest.mark.parametrize(
        ("shape", "rank", "expected"),
        [
            ((16, 4096), 32, (256, 256, 32)),
            ((8, 5120), 16, (160, 256, 16)),
            ((8, 5120), 8, (8, 5120, 8)),  # thick enough as it is
            ((2, 7), 4, (2, 7, 2)),
            ((4, 3, 2), 5, (4, 6, 4)),
            ((1, 4096), 8, None),
            ((7919, 1), 8, None),
            ((24,), 2, None),
        ],
    )
    def test_shapes(self, shape: tuple[int, ...], rank: int, expected: tuple[int, int, int] | None) -> None:
        w = nn.Parameter(torch.zeros(shape))
        found = SubZero([w], rank=rank).matrix(w, rank)
        assert (found if found is None else tuple(found)) == expected

    @pytest.mark.parametrize("shape", [(16, 64), (8, 80)])
    def test_round_trip(self, shape: tuple[int, int]) -> None:
        """A matrix that is searched in another shape moves as that shape, in its own."""
        rank = 20
        w = nn.Parameter(torch.zeros(shape))
        optimizer = SubZero([w], rank=rank, lr=1e-2)
        optimizer.fold_every_step = False
        rows, columns, _ = optimizer.matrix(w, rank)
        basis = optimizer.basis(w)
        assert basis.left.shape == (rows, rank) and basis.right.shape == (columns, rank)
        optimizer.estimate(lambda: (w - 1).square().sum())
        optimizer.step()
        core = optimizer.state[w]["core"].clone()
        optimizer.detach()
        torch.testing.assert_close(w.detach(), basis.lift(core).view(shape))
        assert torch.linalg.matrix_rank(w.detach().view(rows, columns)) <= rank and w.any()


def test_memory() -> None:
    """U and V, (m + n) r in the weight's dtype, the pending core r^2 in fp32: the notes' sum within 10 %."""
    net = nn.Linear(512, 256, bias=False).bfloat16()
    optimizer = SubZero(net.named_parameters(), rank=16, update_precision="native")
    optimizer.fold_every_step = False
    optimizer.estimate(lambda: net(torch.ones(2, 512, dtype=torch.bfloat16)).float().square().mean())
    optimizer.step()
    assert optimizer.state_bytes() == (512 + 256) * 16 * 2 + 16 * 16 * 4
    assert optimizer.state_bytes() == pytest.approx((512 + 256) * 16 * 2, rel=0.1)


@pytest.mark.parametrize(
    ("argument", "value", "named"),
    [
        ("scaling", "both", "scaling"),
        ("betas", (1.0, 0.9), r"betas\[0\]"),
        ("betas", (0.9, -0.1), r"betas\[1\]"),
        ("rank", -3, "rank"),
    ],
)
def test_bad_values(argument: str, value: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"`{named}` must"):
        SubZero([nn.Parameter(torch.ones(3, 3))], **{argument: value})
