"""Low-rank perturbations in activation space: ``x W' + (x B) A'`` instead of ``x (W + A B')'``.

Nothing as large as the weight is written or generated. The perturbed weight ``W + A B'`` is built in scratch memory,
as for dense directions, only if the input has so many rows that the two thin products would cost more, or if the weight
is used in another way than in a product (a convolution, for example).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from zolightning.directions.autocast import without_autocast
from zolightning.directions.basis import Basis
from zolightning.directions.dense import Direction, Negated


class LowRank:
    """Adds the lift of a core to a weight that is used as an (m, n) matrix.

    The core is made at each use and dropped after it: ``pending + direction``.

    Args:
        basis: factors in the weight's dtype.
        shape: (m, n), the shape in which the weight is a matrix.
        pending: the core with pending updates, float32 or wider; None if there are none.
        direction: a direction of the core's shape, which is added to it; None for no perturbation.
    """

    def __init__(
        self, basis: Basis, shape: tuple[int, int], pending: Tensor | None, direction: Direction | None
    ) -> None:
        self.basis = basis
        self.shape = shape
        self.pending = pending
        self.direction = direction

    def opposite(self, negated: Negated) -> "LowRank":
        """The same with its direction negated; pending updates stay."""
        direction = None if self.direction is None else self.direction.opposite(negated)
        return LowRank(self.basis, self.shape, self.pending, direction)

    def write_core(self, out: Tensor) -> Tensor:
        """Writes the core, rounded once to the dtype of `out`, to `out`, which has its shape, and returns it."""
        if self.direction is None:
            return out.zero_() if self.pending is None else out.copy_(self.pending)
        pending = torch.zeros_like(out) if self.pending is None else self.pending
        self.direction.add_to(pending, out)
        return out

    @staticmethod
    def write_cores(groups: Sequence["LowRank"], outs: Tensor) -> None:
        """:meth:`write_core` of perturbations of one matrix, each to one of `outs`, (groups, *core shape)."""
        for group, out in zip(groups, outs, strict=True):
            group.write_core(out)

    def factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """A (m, r) and B (n, r), of the dtype and device of `like`: the perturbation is ``A @ B.T``."""
        shape = self.basis.core_shape(self.shape)
        return self.basis.factors(self.write_core(torch.empty(shape, dtype=like.dtype, device=like.device)))

    def add_to(self, weight: Tensor, out: Tensor, start: int = 0) -> None:
        """Writes ``weight + A @ B.T`` to `out`; `weight` may be some rows of the parameter, from element `start` on."""
        columns = self.shape[1]
        rows, first = weight.view(-1, columns), start // columns
        with without_autocast(weight.device):
            left, right = self.factors(weight)
            torch.addmm(rows, left[first : first + rows.shape[0]], right.T, out=out.view(-1, columns))

    def add_to_rows(self, table: Tensor, rows: Tensor, out: Tensor) -> None:
        if table.shape != self.shape:
            perturbed = torch.empty_like(table)
            self.add_to(table, perturbed)
            torch.index_select(perturbed, 0, rows, out=out)
            return
        with without_autocast(table.device):
            left, right = self.factors(table)
            torch.addmm(F.embedding(rows, table), F.embedding(rows, left), right.T, out=out)

    def product(
        self,
        func: Callable[..., Tensor],
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        core: Tensor | None = None,
    ) -> Tensor | None:
        """Output of a product with the perturbed weight; see :func:`stacked_product`.

        Args:
            func: ``F.linear`` or ``torch.addmm``, with its arguments `inputs`, `weight` and `bias`.
            core: the result of :meth:`write_core`, if it is known already.
        """
        return stacked_product([self], func, inputs, weight, [bias], None if core is None else core[None])


def stacked_product(
    groups: Sequence[LowRank],
    func: Callable[..., Tensor],
    inputs: Tensor,
    weight: Tensor,
    biases: Sequence[Tensor | None],
    cores: Tensor | None = None,
) -> Tensor | None:
    """Output of a product whose input rows form groups of equal size, each with a perturbation of its own.

    The product with the weight is made once, and so are those with factors where all groups share a basis.

    Args:
        groups: perturbations of one weight, with cores of one shape.
        func: ``F.linear``, or ``torch.addmm`` (as GPT-2's layers call it), whose weight is transposed.
        inputs: (..., n), or (k, m) for ``torch.addmm``.
        weight: (m, n), unperturbed.
        biases: the bias of each group, or None.
        cores: the cores of all groups, (groups, *core shape), in the weight's dtype; computed here if None.

    Returns:
        The output, or None if building perturbed weights would cost less.
    """
    basis, shape = groups[0].basis, groups[0].shape
    rows = inputs.reshape(-1, inputs.shape[-1])
    is_linear = func is F.linear
    size_in, size_out = shape[::-1] if is_linear else shape
    if weight.shape != shape or _building_costs_less(rows.shape[0], len(groups), size_in, size_out, weight.device.type):
        return None
    bases = [group.basis for group in groups]
    # Not always one object: graphs copy what holds the factors.
    if len(bases) > 1 and all(other.left is basis.left and other.right is basis.right for other in bases):
        bases = [basis]
    left = [own.left for own in bases if own.left is not None]
    right = [own.right for own in bases if own.right is not None]
    before, after = (right, left) if is_linear else (left, right)
    is_same_bias = all(bias is biases[0] for bias in biases)
    bias = biases[0] if is_same_bias else None
    # As a matrix of rows, because torch would copy the weight for each example of a strided batch.
    if is_linear:
        output = F.linear(rows, weight, bias)
    else:
        output = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    if cores is None:
        cores = torch.empty(len(groups), *basis.core_shape(shape), dtype=weight.dtype, device=weight.device)
        groups[0].write_cores(groups, cores)
    _add_thin_products(output, rows, before, cores.mT if is_linear else cores, after)
    if not is_same_bias:
        for part, own in zip(output.chunk(len(groups)), biases, strict=True):
            if own is not None:
                part.add_(own)
    return output.view(*inputs.shape[:-1], output.shape[-1])


def _add_thin_products(output: Tensor, rows: Tensor, before: list[Tensor], cores: Tensor, after: list[Tensor]) -> None:
    """``output += rows @ before @ core @ after.T`` for each group's rows, as batched products, which are much faster.

    On either side there is no factor, one for all groups, or one for each of them.
    """
    count, dtype = cores.shape[0], output.dtype  # under autocast narrower than the weight
    rows, cores = rows.to(dtype), cores.to(dtype)
    thin = rows @ before[0].to(dtype) if len(before) == 1 else rows
    parts = thin.view(count, -1, thin.shape[-1])
    if len(before) > 1:
        parts = torch.bmm(parts, torch.stack(before).to(dtype))
    if len(after) == 1:
        output.addmm_(torch.bmm(parts, cores).flatten(0, 1), after[0].T.to(dtype))
    elif after:
        output.view(count, -1, output.shape[-1]).baddbmm_(torch.bmm(parts, cores), torch.stack(after).mT.to(dtype))
    else:
        output.view(count, -1, output.shape[-1]).baddbmm_(parts, cores)


def _building_costs_less(rows: int, groups: int, size_in: int, size_out: int, device_type: str) -> bool:
    """Whether one product with a weight built for each group beats the thin products.

    Args:
        rows: rows of the input, of all groups together.
        groups: number of groups; without built weights they share one product with the stored weight.
        size_in: columns of the input.
        size_out: columns of the output.
        device_type: "cpu", for which the bounds were measured, or another type, for which they were derived.
    """
    numel = size_in * size_out
    if device_type == "cpu":
        return rows / groups * (size_in + size_out) >= (2 if groups == 1 else 4) * numel
    # Memory traffic, not counting thin factors. Building reads the weight, and writes and reads the built one, once
    # a group. The thin products read the weight once, the input once more, and read and write the output once more.
    return rows * (size_in + 2 * size_out) >= (3 * groups - 1) * numel
