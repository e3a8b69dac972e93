"""The queries of a step together: least squares in the span of their directions, in the place of a mean.

With the directions z_1..z_q, of unit variance, as the rows of Z, (q, d), a step learns ``g = Z gradient``. The mean of
the ``g_i z_i`` is ``Z' g / q``; the projection of the gradient on the span is ``Z' (Z Z')^-1 g``, and d / q times it
has the same expectation, the gradient, and less variance: its mean square is d / q times that of the gradient, that of
the mean (d + q + 1) / q times (projection alignment, arXiv 2509.15552). For orthogonal directions of one length both
are the same.

So there is something to gain where d is not much larger than q. d counts what is searched in all parameters together,
of subspace methods the elements of cores: Z is the noise, in whose coordinates they search.
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
    from zolightning.optim.estimating import Estimating

MOST_NUMBERS = 1000  # a query: with more, Z Z' is its expectation but for what changes the variance by less than 0.1 %
# Of the largest eigenvalue of Z Z': smaller ones would enlarge the rounding of losses as much. They occur where about
# as many directions are drawn as numbers are searched, and a few hundredths of the gradient are left out with them.
_LEAST = 1e-3
_CHUNK = 2**18  # noise is made of halves of integers up to 8: the sum of so many products is exact in fp32


def aligned(optimizer: "Estimating", projected_grads: Sequence[float], warns: bool) -> list[float]:
    """Numbers c_i such that the mean of ``c_i z_i`` is d / q times the projection of the gradient on the span.

    With more than d queries it is the gradient. d is measured, by the mean square length of the directions. Where it
    exceeds ``MOST_NUMBERS`` a query, the projected gradients are returned as they are.

    Args:
        optimizer: before the step.
        projected_grads: one a query.
        warns: say so if they are returned as they are.
    """
    queries = [optimizer.perturbations(query, 1) for query in range(len(projected_grads))]
    shapes = {p: shape for p, change in queries[0].items() if (shape := _noise_shape(optimizer, p, change))}
    numbers = sum(map(math.prod, shapes.values()))
    if numbers > MOST_NUMBERS * len(queries):
        if warns:
            rank_zero_warn(
                f"`align_queries` has no effect: {numbers:,} numbers are searched along {len(queries)} directions, "
                "whose mean is as good but for less than 0.1 % of the variance. Leave it out, or search fewer numbers."
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


def _noise_shape(optimizer: "Estimating", parameter: nn.Parameter, change: Perturbation) -> tuple[int, ...] | None:
    """Shape of the noise in a perturbation; None where there is none."""
    if isinstance(change, LowRank):
        return None if change.direction is None else change.basis.core_shape(change.shape)
    return optimizer.trainable_shape(parameter)


def _products(
    changes: list[Perturbation], parameter: nn.Parameter, shape: tuple[int, ...], optimizer: "Estimating"
) -> Tensor:
    """Inner products of the noise in some perturbations of a parameter, (q, q), float64."""
    size = max(2, min(_CHUNK, 2**22 // len(changes) // 2 * 2))  # noise comes in pairs of elements
    total = torch.zeros(len(changes), len(changes), dtype=torch.float64, device=parameter.device)
    part_of = optimizer.slices.get(parameter)
    with as_contiguous(parameter, part_of) as weight, without_autocast(parameter.device):
        for part in chunks(math.prod(shape), size):
            noise = torch.stack([_direction(change).noise(weight.view(-1)[part], part.start) for change in changes])
            total += noise @ noise.T
    return total


def _direction(change: Perturbation) -> Direction:
    found = change.direction if isinstance(change, LowRank) else change
    assert isinstance(found, Direction)
    return found
