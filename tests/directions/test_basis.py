"""Bases: their distribution, lifting and projecting, and what transport keeps."""

import pytest
import torch
from torch import Tensor

from zolightning.directions.basis import Basis, gaussian, orthonormal

CPU = torch.device("cpu")
SHAPE = (12, 9)
SIDES = ["left", "right", "both"]


def drawn(size: int, rank: int, refresh: int = 0, unit: bool = True, name: str = "w") -> Tensor:
    factor = gaussian(size, rank, seed=3, refresh=refresh, name=name, device=CPU).double()
    return orthonormal(factor) if unit else factor


def basis(sides: str, refresh: int = 0, unit: bool = True) -> Basis:
    left = None if sides == "right" else drawn(SHAPE[0], 4, refresh, unit, "w/left")
    right = None if sides == "left" else drawn(SHAPE[1], 4, refresh, unit, "w/right")
    return Basis(left, right)


def core(like: Basis) -> Tensor:
    shape = like.core_shape(SHAPE)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class TestFactors:
    def test_are_functions_of_seed_refresh_and_name_whatever_the_default_dtype(self) -> None:
        def draw(seed: int = 1, refresh: int = 2, name: str = "w") -> Tensor:
            return gaussian(6, 3, seed, refresh, name, CPU)

        assert torch.equal(draw(), draw()) and draw().dtype == torch.float32
        assert all(not torch.equal(draw(), other) for other in (draw(seed=2), draw(refresh=3), draw(name="v")))
        expected = draw()
        torch.set_default_dtype(torch.bfloat16)  # as Lightning does in the steps of `bf16-true`
        try:
            assert torch.equal(draw(), expected)
        finally:
            torch.set_default_dtype(torch.float32)

    def test_moments_of_a_normal(self) -> None:
        """Of 200,000 numbers, within five standard errors of 0, 1, 0 and of a kurtosis of 3 - 1/32."""
        x = gaussian(2000, 100, 0, 0, "w", CPU).double()
        for power, expected, deviation in (
            (1, 0.0, 1.0),
            (2, 1.0, 2**0.5),
            (3, 0.0, 15**0.5),
            (4, 3 - 1 / 32, 96**0.5),
        ):
            assert (x**power).mean().item() == pytest.approx(expected, abs=5 * deviation / x.numel() ** 0.5)

    @pytest.mark.parametrize("shape", [(40, 8), (8, 8), (5, 1)])
    def test_orthonormal_columns(self, shape: tuple[int, int]) -> None:
        q = orthonormal(gaussian(*shape, 0, 0, "w", CPU))
        torch.testing.assert_close(q.T @ q, torch.eye(shape[1]), rtol=0, atol=1e-6)

    def test_orthonormal_ones_are_haar_distributed(self) -> None:
        """``E P_11^2 = 1 / m`` and ``E P_11 = 0``; without the sign correction P_11 would have one sign only."""
        count, m = 2000, 8
        first = torch.stack([drawn(m, 2, refresh)[0, 0] for refresh in range(count)])
        # P_11 is a coordinate of a random unit vector: P_11^2 is Beta(1/2, (m - 1) / 2), of variance 0.0219 for m = 8.
        assert (first**2).mean().item() == pytest.approx(1 / m, abs=4 * (0.0219 / count) ** 0.5)
        assert first.mean().item() == pytest.approx(0, abs=4 * (1 / m / count) ** 0.5)


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("sides", SIDES)
class TestLift:
    def test_is_the_product_of_the_factors(self, sides: str, unit: bool) -> None:
        b = basis(sides, unit=unit)
        expected = z = core(b)
        if b.left is not None:
            expected = b.left @ expected
        if b.right is not None:
            expected = expected @ b.right.T
        torch.testing.assert_close(b.lift(z), expected)
        one, other = b.factors(z)
        assert one.shape == (12, 4) and other.shape == (9, 4)
        assert torch.linalg.matrix_rank(b.lift(z)) == 4
        assert b.squared_norm(z) == pytest.approx(expected.square().sum().item())

    def test_singular_values_are_those_of_the_lift(self, sides: str, unit: bool) -> None:
        b = basis(sides, unit=unit)
        torch.testing.assert_close(b.singular_values(core(b)), torch.linalg.svdvals(b.lift(core(b)))[:4])

    def test_projecting_gives_the_nearest_lift(self, sides: str, unit: bool) -> None:
        b = basis(sides, unit=unit)
        torch.testing.assert_close(b.project(b.lift(core(b))), core(b))
        matrix = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        rest = matrix - b.lift(b.project(matrix))
        torch.testing.assert_close(b.project(rest), torch.zeros(b.core_shape(SHAPE), dtype=torch.float64))

    def test_transport_is_lifting_and_projecting(self, sides: str, unit: bool) -> None:
        old, new = basis(sides, 0, unit=unit), basis(sides, 1, unit=unit)
        torch.testing.assert_close(old.transport(core(old), new), new.project(old.lift(core(old))))
        torch.testing.assert_close(old.transport(core(old), old), core(old))

    def test_transport_is_exact_into_a_basis_that_contains_the_old_one(self, sides: str, unit: bool) -> None:
        old, other = basis(sides, 0, unit=unit), basis(sides, 1, unit=unit)

        def wider(one: Tensor | None, two: Tensor | None) -> Tensor | None:
            return None if one is None else orthonormal(torch.cat([two, one], dim=1))

        new = Basis(wider(old.left, other.left), wider(old.right, other.right))
        torch.testing.assert_close(new.lift(old.transport(core(old), new)), old.lift(core(old)), rtol=0, atol=1e-12)

    def test_transport_computes_in_the_dtype_of_the_core(self, sides: str, unit: bool) -> None:
        old, new = basis(sides, 0, unit=unit), basis(sides, 1, unit=unit)

        def rounded(b: Basis) -> Basis:
            return Basis(*(None if f is None else f.bfloat16() for f in (b.left, b.right)))

        found = rounded(old).transport(core(old).float(), rounded(new))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, old.transport(core(old), new).float(), rtol=0, atol=0.1)

    @pytest.mark.parametrize("columns", [[0, 1, 2, 2], [0, 1, 1, 1]])
    def test_a_core_is_projected_onto_a_basis_of_dependent_columns(
        self, sides: str, unit: bool, columns: list[int]
    ) -> None:
        """As some Gaussian factors of small matrices have."""
        old, b = basis(sides, 0, unit=unit), basis(sides, 1, unit=unit)
        b, independent = (
            Basis(*(None if f is None else f[:, kept] for f in (b.left, b.right)))
            for kept in (columns, sorted(set(columns)))
        )
        expected = independent.lift(old.transport(core(old), independent))
        torch.testing.assert_close(b.lift(old.transport(core(old), b)), expected)

    @pytest.mark.parametrize("count", [1, 3])
    def test_an_anchored_basis_keeps_the_dominant_directions(self, sides: str, unit: bool, count: int) -> None:
        old, fresh = basis(sides, 0, unit=unit), basis(sides, 1, unit=unit)
        u, _, vh = torch.linalg.svd(core(old), full_matrices=False)
        decay = torch.logspace(0, -6, len(vh), dtype=torch.float64)
        z = u * decay @ vh
        new = fresh.anchored(old, z, count, unit)
        dominant = (u * decay)[:, :count] @ vh[:count]
        torch.testing.assert_close(new.lift(old.transport(dominant, new)), old.lift(dominant), rtol=0, atol=1e-9)
        for side in ("left", "right"):
            factor = getattr(new, side)
            assert (factor is None) == (getattr(old, side) is None)
            if factor is not None:
                assert factor.shape == getattr(fresh, side).shape
                assert torch.linalg.matrix_rank(factor) == 4
                if unit:
                    torch.testing.assert_close(factor.T @ factor, torch.eye(4, dtype=torch.float64))
                else:
                    assert torch.equal(factor[:, count:], getattr(fresh, side)[:, count:])


def test_an_independent_basis_keeps_a_share_of_r_over_m() -> None:
    """r / m = 1/16 of the energy; its mean over 20 bases is good to about 1 % of that."""
    shares = []
    for refresh in range(20):
        old, new = (Basis(left=drawn(512, 32, 2 * refresh + i)) for i in range(2))
        z = torch.randn(32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(refresh))
        shares.append(new.squared_norm(old.transport(z, new)) / old.squared_norm(z))
    assert sum(shares) / 20 == pytest.approx(1 / 16, rel=0.05)
