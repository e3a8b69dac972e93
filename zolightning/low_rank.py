"""Low-rank perturbations in activation space: ``x W' + (x B) A'`` instead of ``x (W + A B')'``.

Nothing of the weight's size is written or generated. Where a layer has so many rows of input that the two thin
products cost more than building ``W + A B'`` once, and where a weight is used in another way than by a product (a
convolution, say), the perturbed weight is built in scratch memory as for dense directions.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from zolightning.basis import Basis
from zolightning.direction import Direction

_BUILD_COST = 2  # of one element of a built weight, in multiples of its share of `A @ B.T`: it is also written and read


class LowRank:
    """Adds the lift of a core to a weight that is used as an (m, n) matrix.

    The core is made at each use and dropped after it: ``pending + direction``.

    Args:
        basis: factors in the weight's dtype.
        shape: (m, n), the shape in which the weight is a matrix.
        pending: a core at hand, float32 or wider.
        direction: of the core's shape, added to it.
    """

    def __init__(
        self, basis: Basis, shape: tuple[int, int], pending: Tensor | None, direction: Direction | None
    ) -> None:
        self.basis = basis
        self.shape = shape
        self.pending = pending
        self.direction = direction

    def core(self, like: Tensor) -> Tensor:
        """The core, of the dtype and device of `like`, rounded once."""
        shape = self.basis.core_shape(self.shape)
        pending = torch.zeros(shape, dtype=like.dtype, device=like.device) if self.pending is None else self.pending
        if self.direction is None:
            return pending.to(like.dtype)
        core = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.direction.add_to(pending, core)
        return core

    def factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """A (m, r) and B (n, r), of the dtype and device of `like`: the perturbation is ``A @ B.T``."""
        return self.basis.factors(self.core(like))

    def add_to(self, weight: Tensor, out: Tensor) -> None:
        left, right = self.factors(weight)
        torch.addmm(weight.view(self.shape), left, right.T, out=out.view(self.shape))

    def add_to_rows(self, table: Tensor, rows: Tensor, out: Tensor) -> None:
        if table.shape != self.shape:
            perturbed = torch.empty_like(table)
            self.add_to(table, perturbed)
            torch.index_select(perturbed, 0, rows, out=out)
            return
        left, right = self.factors(table)
        torch.addmm(F.embedding(rows, table), F.embedding(rows, left), right.T, out=out)

    def product(
        self, func: Callable[..., Tensor], inputs: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        """Output of a product with the perturbed weight; see :func:`stacked_product`."""
        return stacked_product([self], func, inputs, weight, [bias])


def stacked_product(
    groups: Sequence[LowRank],
    func: Callable[..., Tensor],
    inputs: Tensor,
    weight: Tensor,
    biases: Sequence[Tensor | None],
) -> Tensor | None:
    """Output of a product whose rows come in groups of one size, each with a perturbation of its own.

    The weight is multiplied once, and so are the factors, which all groups share; only cores differ.

    Args:
        groups: perturbations of one weight, in one basis and with one pending core.
        func: ``F.linear``, or ``torch.addmm`` (as GPT-2's layers call it), whose weight is transposed.
        inputs: (..., n), or (k, m) for ``torch.addmm``.
        weight: (m, n), unperturbed.
        biases: of each group, added if any.

    Returns:
        The output; None where building perturbed weights costs less.
    """
    basis, shape = groups[0].basis, groups[0].shape
    rows = inputs.reshape(-1, inputs.shape[-1])
    if weight.shape != shape or len(rows) * sum(shape) >= _BUILD_COST * weight.numel() * len(groups):
        return None
    is_linear = func is F.linear
    first, second = (basis.right, basis.left) if is_linear else (basis.left, basis.right)
    is_same_bias = all(bias is biases[0] for bias in biases)
    bias = biases[0] if is_same_bias else None
    # Rows, because for a strided batch torch would copy the weight once an example.
    if is_linear:
        output = F.linear(rows, weight, bias)
    else:
        output = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    dtype = output.dtype  # under autocast narrower than the weight
    count = len(groups)
    thin = rows.to(dtype) if first is None else rows.to(dtype) @ first.to(dtype)
    cores = [group.core(weight).to(dtype) for group in groups]
    pairs = zip(thin.chunk(count), (core.T if is_linear else core for core in cores), strict=True)
    if second is None:
        for part, (thin_part, core) in zip(output.chunk(count), pairs, strict=True):
            part.addmm_(thin_part, core)
    else:
        thin_parts = [part @ core for part, core in pairs]
        output.addmm_(torch.cat(thin_parts) if count > 1 else thin_parts[0], second.T.to(dtype))
    if not is_same_bias:
        for part, bias in zip(output.chunk(count), biases, strict=True):
            part.add_(bias)
    return output.view(*inputs.shape[:-1], -1)
