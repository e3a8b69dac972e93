"""LOZO and LOZO-M against restatements of their definitions."""

import pytest
import torch
from torch import Tensor, nn

from optimizer_steps import standard
from zolightning.kernels.noise import key
from zolightning.optim import LOZO

STEPS, INTERVAL = 13, 5


class Quadratic(nn.Module):
    """``tr(X' Q X) / 2 + <B, X>`` over a matrix, and the like over a vector."""

    def __init__(self, rows: int = 7, columns: int = 6) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        mix = torch.randn(rows, rows, dtype=torch.float64, generator=draw)
        self.q = mix @ mix.T / rows + torch.eye(rows)
        self.b = torch.randn(rows, columns, dtype=torch.float64, generator=draw)
        self.w = nn.Parameter(torch.randn(rows, columns, dtype=torch.float64, generator=draw))
        self.v = nn.Parameter(torch.randn(5, dtype=torch.float64, generator=draw))

    def forward(self) -> Tensor:
        return (self.w * (self.q @ self.w)).sum() / 2 + (self.b * self.w).sum() + self.v.square().sum()

    def at(self, w: Tensor, v: Tensor) -> float:
        with torch.no_grad():
            return torch.func.functional_call(self, {"w": w, "v": v}, ()).item()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_method_with_new_bases(momentum: float) -> None:
    """Also right after new bases are drawn: all of a step is along the U that was evaluated."""
    net, lr, eps, rank = Quadratic(), 0.02, 1e-2, 3
    w, v = net.w.detach().clone(), net.v.detach().clone()
    optimizer = LOZO(net.named_parameters(), lr=lr, eps=eps, rank=rank, momentum=momentum, seed=4)
    n_matrix, n_vector, previous = torch.zeros(7, rank).double(), torch.zeros(5).double(), None
    for step in range(STEPS):
        if step and step % INTERVAL == 0:
            optimizer.resample()
        big_v = optimizer.basis(net.w).right
        if previous is not None and previous is not big_v:
            # (V' V) X' = V' (N V_old')' by least squares
            n_matrix = torch.linalg.lstsq(big_v, previous @ n_matrix.T).solution.T
        previous = big_v
        u = standard((7, rank), key(4, step, 0, "w")).double()
        z = standard((5,), key(4, step, 0, "v")).double()
        plus = net.at(w + eps * u @ big_v.T, v + eps * z)
        minus = net.at(w - eps * u @ big_v.T, v - eps * z)
        c = (plus - minus) / (2 * eps)
        n_matrix, n_vector = (momentum * n + (1 - momentum) * c * d for n, d in ((n_matrix, u), (n_vector, z)))
        w, v = w - lr * n_matrix @ big_v.T / rank, v - lr * n_vector
        record = optimizer.estimate(net)
        optimizer.step()
        assert record.projected_grads[0] == pytest.approx(c, rel=1e-4)
    optimizer.detach()
    torch.testing.assert_close(net.w.detach(), w, rtol=0, atol=2e-5)
    torch.testing.assert_close(net.v.detach(), v, rtol=0, atol=2e-5)


def test_normalized_steps_do_not_know_the_scale_of_the_loss() -> None:
    """The first is ``lr`` along the direction, up or down; a later one is at most ``clip`` times as long as the RMS."""
    moves: list[list[Tensor]] = []
    for scale in (1.0, 2.0**10):
        net, moved = Quadratic(), []
        optimizer = LOZO(net.named_parameters(), lr=0.02, rank=2, vector_lr=0.0, normalize=True, clip=1.5, seed=4)
        for spike in (1.0, 100.0):
            before = net.w.detach().clone()
            optimizer.estimate(lambda net=net, factor=scale * spike: factor * net())
            optimizer.step()
            moved.append(net.w.detach() - before)
        moves.append(moved)
    torch.testing.assert_close(*moves, rtol=1e-4, atol=1e-7)
    sizes = []
    for step in range(2):
        u = standard((7, 2), key(4, step, 0, "w")).double()
        core = torch.linalg.lstsq(optimizer.basis(net.w).right, moves[0][step].T).solution.T
        factor = (core * u).sum() / u.square().sum()
        torch.testing.assert_close(core, factor * u, rtol=1e-3, atol=1e-5)
        sizes.append(factor.abs().item() * 2 / 0.02)
    assert sizes == [pytest.approx(1, rel=1e-3), pytest.approx(1.5 / (0.99 / 1.99 + 1.5**2 / 1.99) ** 0.5, rel=1e-3)]


def test_the_rows_of_moves_lie_in_the_span_of_the_basis() -> None:
    net = Quadratic()
    optimizer = LOZO(net.named_parameters(), lr=0.02, rank=2)
    before, span = net.w.detach().clone(), optimizer.basis(net.w).right
    for _ in range(4):
        optimizer.estimate(net)
        optimizer.step()
    optimizer.detach()
    moved = net.w.detach() - before
    rest = moved - torch.linalg.lstsq(span, moved.T).solution.T @ span.T
    assert rest.norm() < 1e-12 * moved.norm()
    assert torch.linalg.matrix_rank(moved) == 2


def test_without_momentum_the_momentum_form_is_the_plain_one() -> None:
    weights = []
    for momentum in (0.0, 1e-300):
        net = Quadratic()
        optimizer = LOZO(net.named_parameters(), lr=0.02, momentum=momentum)
        for _ in range(6):
            optimizer.estimate(net)
            optimizer.step()
        optimizer.detach()
        weights.append(net.w.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)  # coefficients have 20 bits


def test_the_step_is_unbiased_over_bases() -> None:
    """``E[c U V'] = r G`` over U and V, which the division by r undoes; c is the derivative of the loss along ``U V'``.

    In d = 42 dimensions with N = 800 samples, whose fourth moments are about twice those of dense noise, the error
    is about sqrt(2 (d + 1) / N) = 0.33 of the gradient; without the division it would be 1.
    """
    net, rank, count = Quadratic(), 2, 800
    gradient = (net.q @ net.w + net.b).detach()
    optimizer = LOZO([("w", net.w)], rank=rank, eps=1.0)
    total, z = torch.zeros_like(gradient), torch.zeros_like(gradient)
    for _ in range(count):
        optimizer.perturbations(0, 1)[net.w].add_to(torch.zeros_like(gradient), z)
        total += (gradient * z).sum() * z / rank / count
        optimizer.param_groups[0]["step"] += 1
        optimizer.resample()
    assert (total - gradient).norm() < 0.5 * gradient.norm()


def test_memory() -> None:
    """V (n, r) in the weight's dtype, pending core and momentum (m, r) in fp32, low words and momentum of vectors."""
    net = nn.Linear(512, 256).bfloat16()
    inputs = torch.ones(2, 512, dtype=torch.bfloat16)
    for momentum, expected in ((0.0, 512 * 8 * 2 + 256 * 8 * 4), (0.9, 512 * 8 * 2 + 2 * 256 * 8 * 4 + 256 * 4)):
        optimizer = LOZO(net.named_parameters(), rank=8, momentum=momentum)
        optimizer.fold_every_step = False
        optimizer.estimate(lambda: net(inputs).float().square().mean())
        optimizer.step()
        assert optimizer.state_bytes() == expected + 2 * 256
    optimizer.resample()
    assert optimizer.state_bytes() == 512 * 8 * 2 + 256 * 8 * 4 + 256 * 4 + 2 * (256 + 256 * 512)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("rank", 0),
        ("rank", 1.5),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("vector_lr", -1.0),
        ("vector_lr", float("nan")),
    ],
)
def test_bad_values(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` must"):
        LOZO([nn.Parameter(torch.ones(3, 3))], **{argument: value})
