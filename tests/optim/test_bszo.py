"""BSZO against restatements: the paper's filter with whole matrices, and the posterior of a linear model."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from optimizer_steps import MakeProblem, attached, run, standard
from zolightning.directions.slices import Slice
from zolightning.kernels.noise import key
from zolightning.optim import BSZO, MeZO
from zolightning.optim.estimators import OneSided

numbers = st.floats(-100, 100).map(lambda value: round(value, 3))


def vector(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def means(measured: Any, steps: int = 1, **settings: Any) -> Tensor:
    """What the last of some steps with these projected gradients makes of them."""
    optimizer = BSZO([nn.Parameter(torch.zeros(2))], num_queries=len(measured), **settings)
    for _ in range(steps):
        found = optimizer.transform_grads(optimizer.param_groups[0], tuple(measured))
    return vector(found)


@pytest.mark.parametrize("num_reused", [0, 1, 3])
def test_the_method(make_problem: MakeProblem, num_reused: int) -> None:
    """Algorithm 2 with the d, K and Sigma of a Kalman filter in any coordinates, and the cache of algorithm 1."""
    k, steps, eps, lr, prior, noise, smoothing, decay = 3, 12, 0.1, 0.03, 2.0, 0.5, 0.2, 0.1
    module, other = make_problem(torch.float64), make_problem(torch.float64)
    settings = {"prior_variance": prior, "noise_variance": noise, "smoothing": smoothing, "num_reused": num_reused}
    run(module, attached(BSZO, module, num_queries=k, eps=eps, lr=lr, weight_decay=decay, **settings), steps)
    weights = dict(other.named_parameters())

    def loss_at(moves: dict[str, Tensor]) -> float:
        return torch.func.functional_call(other, {name: weights[name] + moves[name] for name in weights}, ()).item()

    with torch.no_grad():
        for step in range(steps):
            z = [
                {name: standard(w.shape, key(0, step, i, name)).double() for name, w in weights.items()}
                for i in range(k)
            ]
            before = loss_at(dict.fromkeys(weights, torch.zeros(())))
            measured = [(loss_at({name: eps * part for name, part in along.items()}) - before) / eps for along in z]
            mu, sigma = torch.zeros(k, dtype=torch.float64), prior * torch.eye(k, dtype=torch.float64)
            for count in range(k + num_reused):
                j = count if count < k else int(sigma.diagonal().argmax())
                d, y = torch.eye(k, dtype=torch.float64)[j], measured[j]
                noise = (1 - smoothing) * noise + smoothing * (y - d @ mu).item() ** 2
                gain = sigma @ d / (d @ sigma @ d + noise)
                mu, sigma = mu + gain * (y - d @ mu), sigma - torch.outer(gain, d @ sigma)
            for name, weight in weights.items():
                weight *= 1 - lr * decay * (weight.ndim >= 2)
                weight -= lr * sum(mu[i] * z[i][name] for i in range(k))
    for found, expected in zip(module.parameters(), other.parameters(), strict=True):
        # Coefficients have 20 bits, and the directions of later steps follow from weights that differ by that.
        torch.testing.assert_close(found, expected, rtol=0, atol=steps * 2e-6)


class TestPosterior:
    @given(st.lists(numbers, min_size=1, max_size=6), st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.7]))
    def test_it_is_that_of_a_linear_model(self, measured: list[float], num_reused: int, smoothing: float) -> None:
        """Equation 9, with the noise of each row as equation 13 has it: one solution for all rows at once."""
        prior, first, k = 30.0, 4.0, len(measured)
        found = means(measured, prior_variance=prior, noise_variance=first, smoothing=smoothing, num_reused=num_reused)
        rows, mean = [], torch.zeros(k, dtype=torch.float64)
        precision = torch.eye(k, dtype=torch.float64) / prior
        noises = [first]
        for count in range(k + num_reused):
            variances = torch.linalg.inv(precision).diagonal()
            rows.append(count if count < k else int((variances > variances.max() * (1 - 1e-12)).int().argmax()))
            residual = measured[rows[-1]] - mean[rows[-1]].item()
            noises.append((1 - smoothing) * noises[-1] + smoothing * residual**2)
            design, inverse = torch.eye(k, dtype=torch.float64)[rows], torch.diag(1 / vector(noises[1:]))
            precision = torch.eye(k, dtype=torch.float64) / prior + design.T @ inverse @ design
            mean = torch.linalg.solve(precision, design.T @ inverse @ vector(measured)[rows])
        torch.testing.assert_close(found, mean, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("num_reused", [0, 1])
    @pytest.mark.parametrize("sure", [{"noise_variance": 1e-300}, {"prior_variance": 1e300}])
    def test_without_noise_or_a_prior_it_is_what_was_measured(self, sure: dict[str, float], num_reused: int) -> None:
        measured = [3.0, -0.25, 1e-3]
        settings = {"prior_variance": 2.0, "noise_variance": 2.0, "smoothing": 0.0, **sure}
        torch.testing.assert_close(means(measured, num_reused=num_reused, **settings), vector(measured))

    @pytest.mark.parametrize("unsure", [{"noise_variance": 1e300}, {"prior_variance": 1e-300}])
    def test_of_noise_alone_it_is_0(self, unsure: dict[str, float]) -> None:
        settings = {"prior_variance": 2.0, "noise_variance": 2.0, "smoothing": 0.0, **unsure}
        assert means([3.0, -0.25], **settings).abs().max() < 1e-200

    @given(st.floats(-1e6, 1e6), st.floats(1e-3, 0.999), st.floats(1e-6, 1e6))
    def test_it_is_bounded(self, measured: float, smoothing: float, prior: float) -> None:
        (found,) = means([measured], prior_variance=prior, smoothing=smoothing, num_reused=0)
        assert abs(found) <= math.sqrt(prior / smoothing) / 2 * (1 + 1e-12)

    def test_the_most_uncertain_measurement_counts_again(self) -> None:
        """After 10 the noise is larger than after 0, the posterior variance too: it is 10 that is reused."""
        settings = {"prior_variance": 1.0, "noise_variance": 1.0, "smoothing": 0.5}
        once, again = (means([0.5, 10.0], num_reused=count, **settings) for count in (0, 1))
        assert again[0] == once[0] and again[1] > 1.1 * once[1]
        assert torch.equal(means([0.5, 10.0], **settings), again)  # as in the paper

    def test_the_noise_is_what_a_step_leaves_to_the_next(self) -> None:
        """In the end s = y^2, and mu = y p / (p + y^2)."""
        found = means([3.0], steps=500, prior_variance=2.0, num_reused=0)
        torch.testing.assert_close(found, vector([3 * 2 / (2 + 9)]))


def test_with_constant_noise_it_is_mezo(make_problem: MakeProblem) -> None:
    module, other = make_problem(torch.float64), make_problem(torch.float64)
    settings = {"prior_variance": 3.0, "noise_variance": 1.0, "smoothing": 0.0, "num_reused": 0}
    run(module, attached(BSZO, module, num_queries=4, lr=0.01, **settings), 10)
    run(other, attached(MeZO, other, num_queries=4, lr=0.01 * 4 * 3 / (3 + 1), estimator=OneSided()), 10)
    for found, expected in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_the_prior_counts_the_weights_that_move(make_problem: MakeProblem) -> None:
    problem = make_problem()
    optimizer = attached(BSZO, problem, noise_variance=1e-5)

    def weights_that_move() -> float:
        shrinkage = optimizer.measurements()["shrinkage"]
        return 10 * shrinkage / (1 - shrinkage)

    assert weights_that_move() == pytest.approx(29)
    optimizer.restrict({problem.matrix: Slice(0, torch.tensor([1, 3]))})
    assert weights_that_move() == pytest.approx(29 - 6)
    optimizer.set_blocks([[problem.images], [problem.vector]])
    optimizer.activate([1])
    assert weights_that_move() == pytest.approx(29 - 6 - 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prior_variance": 0.0}, "`prior_variance` must be a positive number, got 0.0"),
        ({"noise_variance": -1.0}, "`noise_variance` must be a positive number, got -1.0"),
        ({"smoothing": 1.0}, "`smoothing` must be at least 0 and below 1, got 1.0"),
        ({"num_reused": -1}, "`num_reused` must be an integer, at least 0, got -1"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BSZO([nn.Parameter(torch.zeros(2))], **arguments)
