"""Updates of matrices that wait in cores: how they are added to the weights.

The trained weight of a matrix W, (m, n), is ``W + left @ core @ right.T``, and losses are evaluated at and around that.
Cores are fp32. A core is *folded*, that is, added to W,

* at the end of each step if ``fold_every_step`` is set, which is the default. The stored weights are then the trained
  ones between any two steps, and may be read and written.
* otherwise by ``fold``, ``resample`` and ``detach`` only, which saves a pass over the weights at each step. Between
  these, stored weights must not be read or written, except through the module's ``state_dict()``, which always holds
  the trained ones. The optimizer's ``state_dict()`` holds the stored ones as well, so that a resumed run has the same
  bits.

Both ways give the same weights up to rounding. Records count the folds before a step, so that a replay folds at the
same steps. Under a Trainer, :class:`~zolightning.callbacks.ZerothOrder` chooses the way.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from zolightning.directions.autocast import autocast_dtype, without_autocast
from zolightning.directions.basis import Basis
from zolightning.kernels.compiled import chunk_size, chunks
from zolightning.optim.offload import add_offloaded
from zolightning.optim.precision import State, UpdatePrecision, add_tensor

_CHUNK = 2**20  # elements of a lift at a time, at least


def add_lift(
    weight: Tensor,
    first: int,
    basis: Basis,
    core: Tensor,
    extra_bits: State,
    precision: UpdatePrecision,
    are_offloaded: bool,
) -> None:
    """Adds the lift of a core to a weight, in place and piece by piece.

    Args:
        weight: the parameter's data or this rank's rows of it, contiguous.
        first: index of its first element in the whole parameter.
        basis: the basis of the matrix.
        core: the core, in the core shape of that basis, fp32 or wider.
        extra_bits: the mapping that holds the extra bits of a half-precision weight; they are made there if needed.
        precision: how sums are rounded.
        are_offloaded: whether `extra_bits` are in host memory.
    """
    with without_autocast(weight.device):
        one, other = basis.factors(core)
        rows = max(_CHUNK, chunk_size(weight)) // len(other)
        pieces = _pieces(one, other, range(first, first + weight.numel()), rows)
        if are_offloaded:
            add_offloaded(weight, extra_bits, pieces, precision)
            return
        for start, delta in pieces:
            add_tensor(weight, extra_bits, delta, precision, start=start)


def half_spacing(device: torch.device, dtype: torch.dtype) -> float | None:
    """The relative spacing of the numbers that a network computes with in half precision; None if it does not.

    Where it exceeds the perturbation of an element of a core, relative to the element, their sum would lose most of the
    perturbation. It is compared for the largest element because a maximum, unlike a sum, is the same in any order.

    Args:
        device, dtype: of a weight.
    """
    dtype = autocast_dtype(device) or dtype
    return torch.finfo(dtype).eps if dtype.itemsize == 2 else None


def _pieces(one: Tensor, other: Tensor, elements: range, rows: int) -> Iterator[tuple[int, Tensor]]:
    """Computes some elements of ``one @ other.T`` in flat pieces, each with the index of its first element.

    `rows` rows are multiplied at a time, at the same places whichever elements are wanted, because the rounding of a
    row may depend on the rows that are multiplied with it.
    """
    columns = len(other)
    for part in chunks(len(one), max(1, rows)):
        start, stop = (min(max(row * columns, elements.start), elements.stop) for row in (part.start, part.stop))
        if start < stop:
            product = (one[part] @ other.T).flatten()
            yield start - elements.start, product[start - part.start * columns : stop - part.start * columns]
