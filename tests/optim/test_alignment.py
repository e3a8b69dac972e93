"""Aligned queries against projections in NumPy: of autograd's gradient, on the span of the directions."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optimizer_steps import Method, standard
from zolightning.directions.slices import Slice
from zolightning.kernels.noise import key
from zolightning.optim import LOZO, HiZOO, MeZO, SparseMeZO, SubZero
from zolightning.optim.alignment import MOST_NUMBERS, solve
from zolightning.optim.estimators import Estimator, Population, TwoSided

QUERIES = 6


class Net(nn.Module):
    """A quadratic over a matrix and a vector, along which central differences are exact."""

    def __init__(self, rows: int = 7, columns: int = 5) -> None:
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((rows, columns), (3,)))
        self.mix = torch.randn(rows, rows, dtype=torch.float64)

    def forward(self) -> Tensor:
        return (self.mix @ self.w).square().sum() / 2 + (self.w.sum() + self.v.sum()).square() / 2 + self.v.sum()


def noise(shape: tuple[int, ...], name: str, queries: int = QUERIES, kind: Any = "gaussian") -> np.ndarray:
    """The first step's directions of a parameter as rows."""
    rows = [standard(shape, key(0, 0, query, name), kind).double().flatten() for query in range(queries)]
    return torch.stack(rows).numpy()


def projection(rows: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Of a gradient on the span of some rows, times their mean square length."""
    rank = np.linalg.matrix_rank(rows)
    return rows.T @ np.linalg.lstsq(rows.T, gradient, rcond=1e-9)[0] * (rows**2).sum() / rank


def step_of(method: Method, net: Net, params: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """What a first step at rate 1 takes from the weights; `net` has the gradient there afterwards."""
    net().backward()
    optimizer = method(net.named_parameters(), lr=1.0, seed=0, align_queries=True, **kwargs)
    before = [parameter.detach().clone() for parameter in (net.w, net.v)]
    record = optimizer.estimate(net)
    assert record.forward_passes == len(optimizer.estimator.probes(optimizer.num_queries))
    optimizer.step()
    return tuple(old - new.detach() for old, new in zip(before, (net.w, net.v), strict=True))


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize(("estimator", "count"), [(TwoSided(), QUERIES), (Population(), QUERIES - 1)])
def test_a_dense_step_is_the_projection_of_the_gradient(estimator: Estimator, count: int, kind: Any) -> None:
    """Of queries that are compared with each other, on the span of the directions less their mean."""
    net = Net()
    w, v = step_of(MeZO, net, num_queries=QUERIES, estimator=estimator, noise=kind, eps=1e-6)
    rows = np.concatenate([noise((7, 5), "w", kind=kind), noise((3,), "v", kind=kind)], axis=1)
    rows = rows if isinstance(estimator, TwoSided) else rows - rows.mean(0)
    gradient = np.concatenate([net.w.grad.flatten(), net.v.grad])
    found, expected = np.concatenate([w.flatten(), v]), projection(rows, gradient) / count
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_parameter_without_dimensions_counts() -> None:
    slope, start = torch.arange(1.0, 5).double(), torch.zeros(4).double()
    net = nn.ParameterDict({"t": nn.Parameter(torch.tensor(0.5).double()), "v": nn.Parameter(start)})
    optimizer = MeZO(net.named_parameters(), lr=1.0, seed=0, align_queries=True, num_queries=2)
    optimizer.attach(net)
    optimizer.estimate(lambda: net["t"] * 6 + net["v"] @ slope)
    optimizer.step()
    rows = np.concatenate([noise((), "t", 2), noise((4,), "v", 2)], axis=1)
    expected = projection(rows, np.array([6.0, *slope])) / 2
    found = [0.5 - net["t"].item(), *(-net["v"].detach())]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("method", "scale"), [(partial(SubZero, rank=3), 35**0.5 / 3), (partial(LOZO, rank=2, vector_lr=1.0), 1.0)]
)
def test_a_step_in_a_subspace_is_the_projection_in_the_coordinates_of_the_noise(method: Any, scale: float) -> None:
    net = Net()
    w, v = step_of(method, net, num_queries=QUERIES)
    basis = method.func([("w", net.w), ("v", net.v)], seed=0, **method.keywords).basis(net.w)
    core_shape = basis.core_shape((7, 5))
    core = torch.zeros(core_shape, dtype=torch.float64, requires_grad=True)
    (scale * basis.lift(core) * net.w.grad).sum().backward()
    gradient = np.concatenate([core.grad.flatten(), net.v.grad])
    rows = np.concatenate([noise(core_shape, "w"), noise((3,), "v")], axis=1)
    expected = torch.from_numpy(projection(rows, gradient) / QUERIES)
    step = scale * basis.lift(expected[:-3].view(core_shape)) / (1 if method.func is SubZero else 2)
    torch.testing.assert_close(w, step, rtol=0, atol=1e-4 * step.abs().max().item())
    torch.testing.assert_close(v, expected[-3:], rtol=0, atol=1e-4 * step.abs().max().item())


def test_more_queries_than_numbers_give_the_gradient() -> None:
    net = Net(2, 2)
    w, v = step_of(MeZO, net, num_queries=16, noise="rademacher", eps=1e-4)
    torch.testing.assert_close(w, net.w.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(v, net.v.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", ["dynamic", "fixed", "random"])
def test_only_what_moves_counts(mask: Any) -> None:
    net = Net()
    w, v = step_of(partial(SparseMeZO, sparsity=0.5, mask=mask), net, num_queries=QUERIES, eps=1e-6)
    moves = (w != 0).flatten().numpy()
    rows = np.concatenate([noise((7, 5), "w") * moves, noise((3,), "v")], axis=1)
    expected = projection(rows, np.concatenate([net.w.grad.flatten(), net.v.grad])) / QUERIES
    found = np.concatenate([w.flatten(), v])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert 0 < moves.sum() < 35


def test_slices_and_scaled_directions() -> None:
    net = Net(6, 4)
    net.v.requires_grad_(False)
    optimizer = HiZOO([("w", net.w)], lr=1.0, num_queries=24, smoothing=0.0, align_queries=True, noise="rademacher")
    optimizer.restrict({net.w: Slice(1, torch.tensor([1, 3]))})
    net().backward()
    before = net.w.detach().clone()
    optimizer.estimate(net)
    optimizer.step()
    expected = torch.zeros_like(before)
    expected[:, [1, 3]] = net.w.grad[:, [1, 3]]
    torch.testing.assert_close(before - net.w.detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_block_in_which_nothing_moves() -> None:
    net = Net()
    optimizer = LOZO(net.named_parameters(), lr=1.0, vector_lr=0.0, align_queries=True, num_queries=2)
    optimizer.attach(net)
    optimizer.set_blocks([[net.w], [net.v]])
    optimizer.activate([1])
    before = [parameter.detach().clone() for parameter in net.parameters()]
    assert optimizer.estimate(net).projected_grads == (0.0, 0.0)
    optimizer.step()
    assert all(map(torch.equal, net.parameters(), before))


def test_of_orthogonal_directions_the_mean_is_kept() -> None:
    grads = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(solve(16 * torch.eye(5, dtype=torch.float64), grads), grads, rtol=1e-14, atol=0)


def test_where_nothing_is_to_be_gained_it_says_so_once() -> None:
    weight = nn.Parameter(torch.zeros(2 * MOST_NUMBERS + 1))
    optimizers = [MeZO([weight], num_queries=2, align_queries=is_aligned, seed=0) for is_aligned in (True, False)]
    with pytest.warns(UserWarning, match="no effect: with 2,001 numbers searched along 2 directions"):
        first = optimizers[0].estimate(lambda: weight.sin().sum() + weight.sum())
    assert first == optimizers[1].estimate(lambda: weight.sin().sum() + weight.sum())
    optimizers[0].estimate(weight.sum)


def test_perturbations_of_the_users_own_are_refused_by_name() -> None:
    class Shift:
        def add_to(self, weight: Tensor, out: Tensor) -> None:
            out.copy_(weight + 1e-3)

    class Shifts(MeZO):
        def perturbations(self, query: int, sign: int) -> dict[nn.Parameter, Any]:
            return {parameter: Shift() for _, _, parameter in self.trainable()}

    weight = nn.Parameter(torch.zeros(2))
    optimizer = Shifts([weight], num_queries=2, align_queries=True)
    with pytest.raises(ValueError, match=r"`align_queries` is True, but .* Directions, which Shift is not.* False"):
        optimizer.estimate(lambda: weight.sum())


def test_the_variance_that_it_saves() -> None:
    """Mean squares in squared gradients: of the mean (d - 2 + k + q) / q, with a kurtosis k, and d / q if aligned.

    That d is measured adds its relative variance, (k - 1) / (d q).
    """
    numbers, queries, steps, kurtosis = 12, 6, 2000, 3 - 1 / 8
    keys = [key(0, step, query, "x") for step in range(steps) for query in range(queries)]
    rows = torch.stack([standard((numbers,), one) for one in keys]).double().view(steps, queries, numbers)
    gradient = torch.randn(numbers, dtype=torch.float64)
    found: dict[str, list[Tensor]] = {"mean": [], "aligned": []}
    for z in rows:
        g = z @ gradient
        for name, weights in (("mean", g), ("aligned", solve(z @ z.T, g))):
            found[name].append(weights @ z / queries)
    of_mean = (numbers - 2 + kurtosis + queries) / queries
    of_aligned = numbers / queries * (1 + (kurtosis - 1) / (numbers * queries))
    for name, expected in (("mean", of_mean), ("aligned", of_aligned)):
        estimates = torch.stack(found[name])
        squares = estimates.square().sum(1) / gradient.square().sum()
        assert abs(squares.mean() - expected) < 5 * squares.std() / steps**0.5
        errors = estimates.mean(0) - gradient
        assert errors.norm() < 5 * gradient.norm() * (expected / steps) ** 0.5
