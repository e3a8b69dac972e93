"""Newton-Schulz, exact signs and streaming power iteration against singular value decompositions."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zolightning.optim.orthogonalization import msign, newton_schulz, power_iteration


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(spectrum: Tensor, rows: int, columns: int) -> Tensor:
    left, right = (torch.linalg.qr(random(size, len(spectrum), seed=size)).Q for size in (rows, columns))
    return left * spectrum.double() @ right.T


def exact(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


SHAPES = [(16, 64), (64, 16), (3, 16, 64), (2, 40, 7), (5, 5), (1, 8)]


class TestNewtonSchulz:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_is_muons_iteration(self, shape: tuple[int, ...]) -> None:
        x = matrix = random(*shape)
        x = x / x.norm(dim=(-2, -1), keepdim=True)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        torch.testing.assert_close(newton_schulz(matrix), x)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_points_where_the_sign_does(self, shape: tuple[int, ...]) -> None:
        found, expected = newton_schulz(random(*shape)), exact(random(*shape))
        assert (F.cosine_similarity(found.flatten(-2), expected.flatten(-2), dim=-1) > 0.95).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_singular_values(self, dtype: torch.dtype) -> None:
        """From 0.01 of the norm on they land in [0.68, 1.20]."""
        spectrum = torch.logspace(0, -1.5, 40, dtype=torch.float64)
        assert 0.01 < spectrum[-1] / torch.linalg.vector_norm(spectrum) < 0.013
        found = torch.linalg.svdvals(newton_schulz(with_spectrum(spectrum, 64, 128).to(dtype)))[:40]
        assert found.min() > 0.68 and found.max() < 1.205

    @pytest.mark.parametrize("scale", [1e-20, 1e15])
    def test_scale_does_not_matter(self, scale: float) -> None:
        x = random(3, 8, 20).float()
        torch.testing.assert_close(newton_schulz(scale * x), newton_schulz(x), rtol=1e-4, atol=1e-5)

    def test_zero_stays_zero(self) -> None:
        assert not newton_schulz(torch.zeros(2, 3, 4)).any()


class TestSign:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_is_that_of_the_decomposition(self, shape: tuple[int, ...]) -> None:
        torch.testing.assert_close(msign(random(*shape)), exact(random(*shape)))

    def test_of_matrices_without_full_rank(self) -> None:
        matrix = with_spectrum(torch.tensor([3.0, 0.2]), 6, 9).float()
        values = torch.linalg.svdvals(msign(torch.stack([matrix, torch.zeros(6, 9)])))
        torch.testing.assert_close(values[0], torch.tensor([1.0, 1, 0, 0, 0, 0]), rtol=0, atol=1e-5)
        assert not values[1].any()


class TestPowerIteration:
    @staticmethod
    def start(columns: int, count: int) -> Tensor:
        return torch.linalg.qr(random(columns, count, seed=9)).Q

    def test_one_step_by_its_definition(self) -> None:
        matrix, right = random(6, 20), self.start(20, 3)
        steps, new = power_iteration(matrix, right)
        expected = torch.linalg.qr(matrix.T @ (matrix @ right)).Q
        torch.testing.assert_close(new, expected)
        torch.testing.assert_close(steps, F.normalize(matrix @ expected, dim=0) @ expected.T)

    def test_principal_cosines(self) -> None:
        """A gap of 5 to 1 behind the 8th value shrinks the tangent to the dominant space by 25 a step."""
        spectrum = torch.cat([torch.linspace(10, 5, 8), torch.linspace(1, 0.1, 56)])
        matrix, right = with_spectrum(spectrum, 64, 512), self.start(512, 8)
        top = torch.linalg.svd(matrix, full_matrices=False).Vh[:8]
        tangents = []
        for _ in range(4):
            cosine = torch.linalg.svdvals(top @ right).min()
            tangents.append(((1 - cosine**2).clamp_min(0).sqrt() / cosine).item())
            _, right = power_iteration(matrix, right)
        assert all(after <= 1.001 * before / 25 for before, after in pairwise(tangents))
        assert tangents[2] < 0.05  # two steps: a cosine of 0.999

    def test_norm_rank_and_orthonormality(self) -> None:
        matrices, right = random(4, 16, 50), self.start(50, 5).expand(4, 50, 5)
        for _ in range(3):
            steps, right = power_iteration(matrices, right)
            torch.testing.assert_close(steps.norm(dim=(-2, -1)), torch.full((4,), 5**0.5, dtype=torch.float64))
            torch.testing.assert_close(right.mT @ right, torch.eye(5, dtype=torch.float64).expand(4, 5, 5))
        assert (torch.linalg.matrix_rank(steps) == 5).all()

    def test_a_fixed_matrix_gives_its_sign_in_the_end(self) -> None:
        """With k = r and values 2^-i, V aligns with single singular vectors: the error shrinks by 4 a step."""
        matrix, right = with_spectrum(2.0 ** -torch.arange(8), 8, 32), self.start(32, 8)
        for _ in range(30):
            steps, right = power_iteration(matrix, right)
        torch.testing.assert_close(steps, exact(matrix), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("scale", [1e-25, 1e25])
    def test_scale_does_not_matter(self, scale: float) -> None:
        matrix, right = random(6, 20).float(), self.start(20, 3).float()
        for found, expected in zip(power_iteration(scale * matrix, right), power_iteration(matrix, right), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_signs_of_the_start_do_not_matter(self) -> None:
        matrix, right = random(6, 20), self.start(20, 3)
        flipped = right * torch.tensor([1.0, -1, -1], dtype=torch.float64)
        torch.testing.assert_close(power_iteration(matrix, flipped)[0], power_iteration(matrix, right)[0])

    def test_a_zero_matrix_moves_nothing_and_keeps_the_start(self) -> None:
        right = self.start(20, 3)
        steps, new = power_iteration(torch.stack([torch.zeros(6, 20).double(), random(6, 20)]), right.expand(2, 20, 3))
        assert not steps[0].any() and torch.equal(new[0], right)
        assert steps[1].any() and steps.isfinite().all()
