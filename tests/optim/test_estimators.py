"""Estimators against closed forms on a quadratic, where finite differences can be worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from optimizer_steps import standard
from zolightning.kernels.noise import NoiseKind, key
from zolightning.optim import MeZO
from zolightning.optim.estimators import Estimator, OneSided, Population, Probe, TwoSided, ZScores
from zolightning.optim.probing import losses_along
from zolightning.optim.share import Share

DIM = 24
EPS = 1e-2

generator = torch.Generator().manual_seed(0)
_half = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
HESSIAN = _half @ _half.T / DIM
POINT = torch.randn(DIM, generator=generator, dtype=torch.float64)
LINEAR = torch.randn(DIM, generator=generator, dtype=torch.float64)
GRADIENT = HESSIAN @ POINT + LINEAR


def loss(point: Tensor) -> Tensor:
    return 0.5 * point @ HESSIAN @ point + LINEAR @ point


def z(query: int, step: int = 0, kind: NoiseKind = "gaussian") -> Tensor:
    return standard((DIM,), key(0, step, query, "x"), kind).double()


def projected_grads(estimator: Estimator, num_queries: int) -> Tensor:
    losses = [loss(POINT + probe.sign * EPS * z(probe.query)) for probe in estimator.probes(num_queries)]
    return estimator.projected_grads(torch.stack(losses), EPS)


class TestProbes:
    @pytest.mark.parametrize("num_queries", [1, 3])
    def test_two_sided(self, num_queries: int) -> None:
        assert TwoSided().probes(num_queries) == [Probe(i, sign) for i in range(num_queries) for sign in (1, -1)]

    @pytest.mark.parametrize("num_queries", [1, 3])
    def test_one_sided_evaluates_the_weights_themselves_once(self, num_queries: int) -> None:
        assert OneSided().probes(num_queries) == [Probe(0, 0)] + [Probe(i, 1) for i in range(num_queries)]

    def test_population_needs_no_baseline(self) -> None:
        assert Population().probes(3) == [Probe(0, 1), Probe(1, 1), Probe(2, 1)]
        assert Population().min_queries == 2

    def test_signs_are_signs(self) -> None:
        class Far(TwoSided):
            def probes(self, num_queries: int) -> list[Probe]:
                return [Probe(0, 1), Probe(0, 2)]

        with pytest.raises(ValueError, match=r"`probes` of Far has Probe\(query=0, sign=2\), but a sign must be"):
            MeZO([nn.Parameter(torch.zeros(2))], estimator=Far())


class Counting(nn.Module):
    """Counts its evaluations in a buffer, of which a step keeps the first."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(POINT.clone())
        self.register_buffer("count", torch.zeros(()))

    def forward(self) -> Tensor:
        self.count += 1
        return loss(self.x)


class Along(TwoSided):
    """Evaluates two further points."""

    found: tuple[float, ...] = ()

    def evaluate(self, optimizer: Any, loss_fn: Any, share: Share, micro_batches: Any = None) -> Any:
        probed = super().evaluate(optimizer, loss_fn, share, micro_batches)
        (group,) = optimizer.param_groups
        moves = [optimizer.directions(group, group["seed"], group["step"], {1: length}) for length in (0.5, -2.0)]
        self.found = tuple(losses_along(optimizer, moves, loss_fn, share))
        return probed


class TestLossesAlong:
    def test_they_are_losses_of_moved_weights_and_leave_no_traces(self) -> None:
        module = Counting()
        optimizer = MeZO(module.named_parameters(), eps=EPS, estimator=Along(), seed=0)
        optimizer.attach(module)
        record = optimizer.estimate(module)
        expected = [loss(POINT + length * z(1)).item() for length in (0.5, -2.0)]
        assert optimizer.estimator.found == pytest.approx(expected, rel=1e-6)
        assert record.forward_passes == 4 and len(record.losses) == 2
        assert record.leaves_traces and module.count == 1

    def test_ranks_share_and_average_them(self) -> None:
        found, sent = [], []
        for index in (0, 1, 2):  # rank 0 makes the first of the two, rank 1 the other one, rank 2 none

            def total(own: Tensor) -> Tensor:
                sent.append(own)
                return own + torch.tensor([[3.0, 3.0]], dtype=torch.float64)  # of another rank, a mean of 1 over 3

            module = Counting()
            optimizer = MeZO(module.named_parameters(), eps=EPS, estimator=Along(), seed=0)
            optimizer.estimate(module, Share(total, 0, index, 3))
            found.append(optimizer.estimator.found)
        own = [loss(POINT + length * z(1)).item() for length in (0.5, -2.0)]
        assert found[0] == pytest.approx(((own[0] + 3) / 4, 1.0), rel=1e-6)
        assert found[1] == pytest.approx((1.0, (own[1] + 3) / 4), rel=1e-6)
        assert found[2] == (1.0, 1.0)


class TestClosedForms:
    def test_two_sided_is_exact_for_a_quadratic(self) -> None:
        expected = torch.stack([GRADIENT @ z(query) for query in range(5)])
        # In float64 the difference of two losses of order 10 is good to 1e-15 * 10 / eps
        torch.testing.assert_close(projected_grads(TwoSided(), 5), expected, rtol=0, atol=1e-11)

    def test_one_sided_is_biased_by_half_the_curvature(self) -> None:
        expected = torch.stack([GRADIENT @ z(i) + EPS / 2 * z(i) @ HESSIAN @ z(i) for i in range(5)])
        torch.testing.assert_close(projected_grads(OneSided(), 5), expected, rtol=0, atol=1e-11)

    def test_population_compares_each_with_the_mean_of_the_others(self) -> None:
        plain = torch.stack([GRADIENT @ z(i) + EPS / 2 * z(i) @ HESSIAN @ z(i) for i in range(5)])
        others = torch.stack([torch.cat([plain[:i], plain[i + 1 :]]).mean() for i in range(5)])
        torch.testing.assert_close(projected_grads(Population(), 5), plain - others, rtol=0, atol=1e-11)

    @given(losses=st.lists(st.floats(-100, 100), min_size=2, max_size=8))
    def test_population_is_the_unbiased_form_of_subtracting_the_mean(self, losses: list[float]) -> None:
        values = torch.tensor(losses, dtype=torch.float64)
        found = Population().projected_grads(values, EPS)
        n = len(losses)
        torch.testing.assert_close(found, n / (n - 1) * (values - values.mean()) / EPS, rtol=1e-9, atol=1e-9)
        assert abs(found.sum().item()) < 1e-8 * n

    @given(losses=st.lists(st.floats(-100, 100), min_size=4, max_size=4), shift=st.floats(-100, 100))
    def test_a_constant_added_to_the_loss_does_not_matter(self, losses: list[float], shift: float) -> None:
        values = torch.tensor(losses, dtype=torch.float64)
        for estimator in (TwoSided(), OneSided(), Population()):
            found, shifted = (estimator.projected_grads(v, EPS) for v in (values, values + shift))
            torch.testing.assert_close(found, shifted, rtol=0, atol=1e-10)


class TestZScores:
    def test_a_step_is_that_of_the_paper(self) -> None:
        """``W + alpha / N sum_i (R_i - mean R) / std R noise_i``, for rewards R that are the negative losses."""
        alpha, sigma, population = 0.3, 0.1, 5
        weight = torch.nn.Parameter(POINT.clone())
        optimizer = MeZO([("x", weight)], lr=alpha, eps=sigma, num_queries=population, estimator=ZScores(), seed=0)
        optimizer.estimate(lambda: loss(weight + 0.0))
        optimizer.step()
        noise = np.stack([z(query).numpy() for query in range(population)])
        rewards = np.array([-loss(POINT + sigma * torch.from_numpy(row)).item() for row in noise])
        scores = (rewards - rewards.mean()) / np.std(rewards)
        np.testing.assert_allclose(weight.detach(), POINT.numpy() + alpha / population * scores @ noise, rtol=1e-5)

    @given(losses=st.lists(st.floats(-100, 100), min_size=2, max_size=8), scale=st.floats(0.1, 10))
    def test_scale_and_shift_do_not_matter(self, losses: list[float], scale: float) -> None:
        values = torch.tensor(losses, dtype=torch.float64)
        if values.std() > 1e-3:
            found, scaled = (ZScores().projected_grads(v, EPS) for v in (values, scale * values + 7))
            torch.testing.assert_close(found, scaled, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("value", [0.0, -1 / 3, 1e3])
    def test_equal_losses_move_nothing(self, value: float) -> None:
        assert not ZScores().projected_grads(torch.full((30,), value, dtype=torch.float64), EPS).any()

    def test_a_mean_of_each_example_changes_nothing(self) -> None:
        """Rewards less their own prompt's mean over the population: the same after the mean over prompts."""
        rewards = torch.rand(6, 9, dtype=torch.float64)  # of 6 members, for 9 prompts
        of_prompts = (rewards - rewards.mean(0)).mean(1)
        found = ZScores().projected_grads(-rewards.mean(1), EPS)
        torch.testing.assert_close(found, -of_prompts / of_prompts.square().mean().sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
class TestMonteCarlo:
    """Moments of ``g z`` with the exact directional derivative g: what theory says of the noise in use.

    With E z_i^4 = k, the components of ``g z`` for a single direction satisfy E |g z|^2 = (d - 1 + k) |grad|^2: of
    the d terms z_j^2 (sum_i grad_i z_i)^2, the square itself contributes |grad|^2 each, and the one with i = j
    contributes k instead of 1. A normal has k = 3, which gives the known d + 2; the 17-valued noise has k = 3 - 1/8,
    and +-1 has k = 1, which gives d. The mean of q independent estimates keeps |grad|^2 of mean and 1/q of the rest:
    (d - 2 + k + q) / q.
    """

    SAMPLES = 6_000

    def estimates(self, kind: NoiseKind) -> Tensor:
        rows = torch.stack([z(0, step, kind) for step in range(self.SAMPLES)])
        return (rows @ GRADIENT)[:, None] * rows

    def test_the_mean_is_the_gradient(self, kind: NoiseKind) -> None:
        kurtosis = 3 - 1 / 8 if kind == "gaussian" else 1
        error = (self.estimates(kind).mean(0) - GRADIENT).norm() / GRADIENT.norm()
        # E |mean - grad|^2 = (d - 2 + k) / N; the square of the norm of d nearly independent components of equal
        # size has a relative deviation of sqrt(2 / d) = 0.29, and the norm itself half of it: 4 of them.
        expected = math.sqrt((DIM - 2 + kurtosis) / self.SAMPLES)
        assert abs(error.item() / expected - 1) < 4 * 0.29 / 2

    @pytest.mark.parametrize("num_queries", [1, 4])
    def test_the_second_moment(self, kind: NoiseKind, num_queries: int) -> None:
        kurtosis = 3 - 1 / 8 if kind == "gaussian" else 1
        means = self.estimates(kind).view(-1, num_queries, DIM).mean(1)
        ratios = means.square().sum(1) / GRADIENT.square().sum()
        expected = (DIM - 2 + kurtosis + num_queries) / num_queries
        # Five standard errors of the mean of independent ratios
        assert abs(ratios.mean() - expected) < 5 * ratios.std() / math.sqrt(len(ratios))
