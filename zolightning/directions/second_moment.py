"""Leading directions of a layer's inputs, from forward passes, as a basis for its weight.

The rows of the gradient of a linear map are linear combinations of its inputs. A few leading directions of the inputs'
uncentred second moment therefore hold much of the gradient (AGZO, arXiv 2601.17261).
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zolightning.directions.basis import gaussian

Scaling = Literal["unit", "rms", "whitened"]

_LEAST = 1e-6  # as a share of the largest eigenvalue: smaller ones are rounding errors of float32
_OVERSAMPLED = 32  # columns of a test matrix in addition to the directions that are asked for


class Leading(NamedTuple):
    """Leading eigenvectors of a second moment.

    Attributes:
        directions: (n, k), orthonormal columns, the leading one first; the largest element of each is positive.
        values: (k,), the eigenvalues: mean squares of the inputs along the directions, at least a millionth of the
            largest.
        energy: the mean squared norm of the inputs, the sum of all n eigenvalues.
    """

    directions: Tensor
    values: Tensor
    energy: float

    @property
    def share(self) -> float:
        """Share of the inputs' energy that these directions hold."""
        return min(1.0, self.values.sum().item() / self.energy)

    def to(self, device: torch.device | str) -> "Leading":
        return Leading(self.directions.to(device), self.values.to(device), self.energy)

    def part(self, places: slice) -> "Leading":
        """The directions at these places."""
        return Leading(self.directions[:, places], self.values[places], self.energy)


class SecondMoment:
    """The mean of ``x x'`` over rows x, streamed, in float32.

    For wide rows only its product with a Gaussian test matrix of k columns is kept, n k numbers instead of n^2, from
    which eigenvectors are found by a Nystrom approximation (Tropp, Yurtsever, Udell and Cevher 2017, arXiv 1706.05736,
    algorithm 3). The error is about the sum of the neglected eigenvalues over k, and a second pass over the same rows
    (:meth:`again`) reduces it to about its square. For rows of at most 2 k numbers the moment is exact.

    Args:
        size: n, the length of a row.
        count: the number of directions that will be asked for.
        seed, name: determine the test matrix.
        device: device of the rows.
    """

    def __init__(self, size: int, count: int, seed: int, name: str, device: torch.device) -> None:
        columns = _columns(size, count)
        if columns == size:
            self.test = torch.eye(size, device=device, dtype=torch.float32)
        else:
            self.test = torch.linalg.qr(gaussian(size, columns, seed, 0, f"{name}/inputs", device)).Q
        self.product = torch.zeros_like(self.test)  # the sum of x x', times `test`
        self.totals = torch.zeros(2, device=device, dtype=torch.float32)  # the number of rows, and of their squares

    def add(self, rows: Tensor) -> None:
        """Adds rows of shape (t, n), in any dtype."""
        rows = rows.float()
        self.product.addmm_(rows.T, rows @ self.test)
        self.totals[0] += len(rows)  # a kernel's argument: a copy from the host would wait for the device
        self.totals[1] += rows.square().sum()

    def again(self) -> None:
        """Begins another pass over the same rows, with a test matrix made of the result so far."""
        if self.test.shape[0] > self.test.shape[1] and bool(torch.isfinite(self.product).all()):
            self.test = torch.linalg.qr(self.product).Q
        self.product.zero_()
        self.totals.zero_()

    def blend(self, old: Leading, weight: float) -> None:
        """Mixes in an earlier moment, given by its leading directions, with the share `weight`."""
        count = self.totals[0].item()
        directions, values = old.directions.to(self.test), old.values.to(self.test)
        self.product.mul_(1 - weight)
        self.product.addmm_(directions * (weight * count * values), directions.T @ self.test)
        self.totals[1] = (1 - weight) * self.totals[1] + weight * count * old.energy

    def leading(self, count: int) -> Leading | None:
        """The eigenvectors of the `count` largest eigenvalues; None if the rows are zero, or not finite."""
        number, squares = self.totals.tolist()
        if not (number > 0 and math.isfinite(squares) and squares > 0):
            return None
        values, vectors = self._eigenpairs(self.product / number)
        if not (torch.isfinite(vectors).all() and values[0] > 0):
            return None
        values, vectors = values.clamp_min(_LEAST * values[0])[:count], vectors[:, :count]
        largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
        return Leading(vectors * largest.sign(), values, squares / number)

    def _eigenpairs(self, product: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues in decreasing order, and eigenvectors as columns."""
        if product.shape[0] == product.shape[1]:
            values, vectors = torch.linalg.eigh((product + product.T) / 2)
            return values.flip(0), vectors.flip(1)
        # The shift keeps the small matrix positive definite; it is subtracted from the eigenvalues.
        shift = torch.finfo(torch.float32).eps * product.norm() * math.sqrt(product.shape[0])
        shifted = (product + shift * self.test).double()
        small = self.test.double().T @ shifted
        factor = torch.linalg.cholesky((small + small.T) / 2)
        root = torch.linalg.solve_triangular(factor.T, shifted, upper=True, left=False)
        vectors, roots, _ = torch.linalg.svd(root, full_matrices=False)
        return (roots.square() - shift).clamp_min(0).float(), vectors.float()


def moment_bytes(size: int, count: int) -> int:
    """Bytes that a :class:`SecondMoment` of rows of `size` numbers keeps: its test matrix and the product with it."""
    return 2 * 4 * size * _columns(size, count)


def _columns(size: int, count: int) -> int:
    """The number of columns of the test matrix: enough for `count` directions, or all if those are not many more."""
    columns = count + _OVERSAMPLED
    return size if size <= 2 * columns else columns


def scaled(leading: Leading, scaling: Scaling, limit: float) -> Tensor:
    """The columns of a basis, (n, k): directions v of eigenvalue l.

    * ``unit``: v, as long as the orthonormal columns that SubZero, ZO-Muon, ZO-MOPI and Subspace-MeZO draw;
    * ``rms``: ``v sqrt(n) min(1, limit / sqrt(l))``, as long as LOZO's Gaussian columns on average, but shorter where
      the products of the inputs with it would have a root mean square above ``limit sqrt(n)``, as with massive
      activations;
    * ``whitened``: ``v / sqrt(l)``, so that equal steps along all columns change the layer's output equally.
    """
    if scaling == "unit":
        return leading.directions
    root = leading.values.sqrt()
    if scaling == "whitened":
        return leading.directions / root
    return leading.directions * (math.sqrt(leading.directions.shape[0]) * (limit / root).clamp_max(1))
