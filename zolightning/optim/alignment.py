"""Combines the queries of a step by least squares instead of averaging them (projection alignment, arXiv 2509.15552).

Let the rows of Z, (q, d), be the directions z_1..z_q, of unit variance, and ``g = Z gradient`` the projected gradients.
The usual estimate is the mean of the ``g_i z_i``, which is ``Z' g / q``. The alternative is the projection of the
gradient on the span of the directions, ``Z' (Z Z')^-1 g``, times d / q. Both have the gradient as their expectation,
but the second one has less variance: its mean square is d / q times that of the gradient, where that of the mean is
(d + q + 1) / q times it. For orthogonal directions of equal length the two are the same.

There is something to gain where d is not much larger than q. Here d is the number of elements searched in all
parameters together; for subspace methods these are the elements of the cores.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zolightning.directions.autocast import without_autocast
from zolightning.directions.dense import Direction
from zolightning.directions.low_rank import LowRank
from zolightning.directions.perturbation import Perturbation
from zolightning.kernels.compiled import chunks
from zolightning.optim.precision import as_contiguous
from zolightning.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from zolightning.optim.base import ZerothOrderOptimizer

MOST_NUMBERS = 1000  # elements per query, above which less than 0.1 % of the variance can be gained
# Eigenvalues of Z Z' below this share of the largest are dropped, because dividing by them amplifies rounding errors of
# the losses. They occur where about as many directions are drawn as elements are searched, and cost a few hundredths of
# the gradient.
_LEAST = 1e-3
_CHUNK = 2**18  # elements; noise is halves of integers up to 8, so fp32 sums so many products exactly


def aligned(optimizer: "ZerothOrderOptimizer", projected_grads: Sequence[float], warns: bool) -> list[float]:
    """Replaces projected gradients by numbers c_i whose mean of ``c_i z_i`` is the least-squares estimate.

    With d queries or more that is the gradient itself. In the scale d / q, d is taken to be the mean squared norm of
    the directions. With more than ``MOST_NUMBERS`` elements per query there is nothing to gain, and the projected
    gradients are returned unchanged; if it `warns`, a warning says so.
    """
    queries = [optimizer.perturbations(query, 1) for query in range(len(projected_grads))]
    found = {parameter: _noise_shape(optimizer, parameter, change) for parameter, change in queries[0].items()}
    shapes = {parameter: shape for parameter, shape in found.items() if shape is not None}  # () is that of a scalar
    if not shapes:  # nothing moves: a block without matrices, for example, where vectors have a rate of 0
        return list(projected_grads)
    numbers = sum(map(math.prod, shapes.values()))
    if numbers > MOST_NUMBERS * len(queries):
        if warns:
            rank_zero_warn(
                f"`align_queries` has no effect: with {numbers:,} numbers searched along {len(queries)} directions, "
                "least squares lowers the variance by less than 0.1 %. Leave it out, or search fewer numbers."
            )
        return list(projected_grads)
    products = [
        _products([query[parameter] for query in queries], parameter, shape, optimizer)
        for parameter, shape in shapes.items()
    ]
    gram = optimizer.estimator.gram(torch.stack([product.to(products[0].device) for product in products]).sum(0).cpu())
    return solve(gram, torch.tensor(projected_grads, dtype=torch.float64)).tolist()


def solve(gram: Tensor, projected_grads: Tensor) -> Tensor:
    """``gram^-1 projected_grads`` times the mean of the eigenvalues that are not 0: (q,), float64 like both."""
    values, vectors = torch.linalg.eigh(gram)
    is_kept = values > _LEAST * values[-1]
    values, vectors = values[is_kept], vectors[:, is_kept]
    return vectors @ (values.mean() / values * (vectors.T @ projected_grads))


def _noise_shape(
    optimizer: "ZerothOrderOptimizer", parameter: nn.Parameter, change: Perturbation
) -> tuple[int, ...] | None:
    """The shape of the noise in a perturbation; None if the perturbation has no noise."""
    if isinstance(change, LowRank):
        return None if change.direction is None else change.basis.core_shape(change.shape)
    return optimizer.trainable_shape(parameter)


def _products(
    changes: list[Perturbation], parameter: nn.Parameter, shape: tuple[int, ...], optimizer: "ZerothOrderOptimizer"
) -> Tensor:
    """Inner products of the noise in q perturbations of a parameter, (q, q), float64."""
    size = max(2, min(_CHUNK, 2**22 // len(changes) // 2 * 2))  # noise comes in pairs of elements
    total = torch.zeros(len(changes), len(changes), dtype=torch.float64, device=parameter.device)
    part_of = optimizer.slices.get(parameter)
    with as_contiguous(parameter, part_of) as weight, without_autocast(parameter.device):
        for part in chunks(math.prod(shape), size):
            noise = torch.stack(
                [_direction(change).unit_noise(weight.view(-1)[part], part.start) for change in changes]
            )
            total += noise @ noise.T
    return total


def _direction(change: Perturbation) -> Direction:
    found = change.direction if isinstance(change, LowRank) else change
    if not isinstance(found, Direction):  # the user's own perturbation
        raise ValueError(
            f"`align_queries` is True, but it compares the noise of Directions, which {type(found).__name__} is not: "
            "set it to False."
        )
    return found
