"""Subspaces of a weight matrix, and the coordinates in which a low-rank method searches.

A basis has a left factor (m, r), a right factor (n, r) or both. What moves is the *core*, and a core stands for the
matrix ``left @ core @ right.T``; a side without a factor counts as the identity:

===========================  ==============  =================
method                       factors         core
===========================  ==============  =================
LOZO                         right           (m, r)
SubZero                      left and right  (r, r)
ZO-Muon, ZO-MOPI             left            (r, n)
===========================  ==============  =================
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zolightning.directions.dense import Direction
from zolightning.kernels.noise import coefficient, key, on_device

Sides = Literal["left", "right", "both"]

_SUMMANDS = 4  # of binomials with 17 values: the sum's excess kurtosis is -1/32


@dataclass(frozen=True, eq=False)
class Basis:
    """One subspace of (m, n) matrices; at least one side has a factor.

    Args:
        left: (m, r), or None for all of the rows.
        right: (n, r), or None for all of the columns.
    """

    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def by_side(self) -> dict[str, Tensor]:
        """The factors that exist, by side, "left" or "right"."""
        return {side: factor for side, factor in (("left", self.left), ("right", self.right)) if factor is not None}

    def core_shape(self, shape: torch.Size | tuple[int, int]) -> tuple[int, int]:
        """Shape of the core of an (m, n) matrix."""
        rows = shape[0] if self.left is None else self.left.shape[1]
        columns = shape[1] if self.right is None else self.right.shape[1]
        return rows, columns

    def factors(self, core: Tensor) -> tuple[Tensor, Tensor]:
        """Thin A (m, r) and B (n, r) with ``A @ B.T == lift(core)``, in the dtype of the core."""
        left = None if self.left is None else self.left.to(core.dtype)
        right = None if self.right is None else self.right.to(core.dtype)
        if left is not None:
            return left, core.T if right is None else right @ core.T
        if right is None:
            raise ValueError("A basis must have a factor on at least one side.")
        return core, right

    def lift(self, core: Tensor) -> Tensor:
        """The (m, n) matrix that a core stands for."""
        one, other = self.factors(core)
        return one @ other.T

    def project(self, matrix: Tensor) -> Tensor:
        """The core whose lift is nearest to an (m, n) matrix, by least squares."""
        core = matrix if self.left is None else _coordinates(self.left, matrix)
        return core if self.right is None else _coordinates(self.right, core.T).T

    def transport(self, core: Tensor, new: "Basis") -> Tensor:
        """``new.project(self.lift(core))`` by products of thin matrices only.

        ZO-MOPI, arXiv 2605.09034, equation 11. LOZO-M (arXiv 2410.07698) divides by n where this solves with the
        Gram matrix of the new factor: for a Gaussian one the two agree as n grows.
        """
        if self.left is not None and new.left is not None:
            core = _coordinates(new.left, self.left.to(core.dtype)) @ core
        if self.right is not None and new.right is not None:
            core = core @ _coordinates(new.right, self.right.to(core.dtype)).T
        return core

    def anchored(self, old: "Basis", core: Tensor, count: int, unit: bool) -> "Basis":
        """A basis whose first columns are dominant directions of a core in another basis; the others are this one's.

        Args:
            old: the basis of `core`, with factors on the same sides as this one.
            core: the matrix whose leading singular vectors are kept, the momentum for example.
            count: how many are kept, at most the rank.
            unit: whether to make columns orthonormal; otherwise their lengths stay.
        """
        u, _, vh = torch.linalg.svd(core, full_matrices=False)

        def factor(old: Tensor | None, fresh: Tensor | None, directions: Tensor) -> Tensor | None:
            if old is None or fresh is None:
                return None
            kept = old.to(core.dtype) @ directions[:, :count]
            joined = torch.cat([kept, fresh[:, kept.shape[1] :].to(core.dtype)], dim=1)
            return (orthonormal(joined) if unit else joined).to(fresh.dtype)

        return Basis(factor(old.left, self.left, u), factor(old.right, self.right, vh.T))

    def singular_values(self, core: Tensor) -> Tensor:
        """Singular values of the lift of a core, in decreasing order: as many as the thin factors have columns."""
        one, other = (torch.linalg.qr(factor).R for factor in self.factors(core))
        return torch.linalg.svdvals(one @ other.T)

    def squared_norm(self, core: Tensor) -> float:
        """Squared Frobenius norm of the lift of a core."""
        one, other = (factor.T @ factor for factor in self.factors(core))
        return (one * other).sum().item()


def gaussian(size: int, rank: int, seed: int, refresh: int, name: str, device: torch.device) -> Tensor:
    """A (size, rank) factor of unit variance, float32, a pure function of (seed, refresh, name)."""
    total = torch.zeros(size, rank, dtype=torch.float32, device=device)  # whatever the default dtype is
    # Directions count queries from 0.
    words = [key(seed, refresh, -1 - i, name) for i in range(_SUMMANDS)]
    keys = on_device(torch.tensor(words, dtype=torch.int32), device)
    weight = coefficient(_SUMMANDS**-0.5, "gaussian")
    coefficients = torch.full((_SUMMANDS,), weight, dtype=torch.float32, device=device)
    Direction(keys, coefficients, "gaussian").accumulate(total)
    return total


def orthonormal(factor: Tensor) -> Tensor:
    """The Q of a QR decomposition whose R has a positive diagonal: Haar-distributed for a Gaussian `factor`.

    Without the sign correction (SubZero's released code) it would not be: LAPACK chooses the signs.
    """
    q, r = torch.linalg.qr(factor)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def _coordinates(factor: Tensor, matrix: Tensor) -> Tensor:
    """Least-squares coordinates (r, k) of the columns of `matrix` (size, k) in the columns of `factor` (size, r).

    Columns may be dependent: of the Gaussian factors (2, 2) one in 20 is singular, since there are few such numbers.
    Of the coordinates that are equally good then, it returns the smallest.
    """
    factor = factor.to(matrix.dtype)
    gram, right = factor.T @ factor, factor.T @ matrix
    found, failed = torch.linalg.solve_ex(gram, right)
    return torch.linalg.pinv(gram, hermitian=True) @ right if failed.any() else found
