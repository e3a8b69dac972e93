"""Updates of matrices that wait in cores: how they are added to the weights.

A core is *folded*, that is, its lift is added to the weight W,

* at the end of each step if ``fold_every_step`` is set, which is the default. The stored weights are then the trained
  ones between any two steps, and may be read and written.
* otherwise by ``fold``, ``resample`` and ``detach`` only, and by ``estimate`` where a core has become too large to be
  perturbed in half precision. This saves a pass over the weights at each step. Between these, stored weights must not
  be read or written, except through the module's ``state_dict()``, which always holds the trained ones. The optimizer's
  ``state_dict()`` holds the stored ones as well, so that a resumed run has the same bits.

Both ways give the same weights up to rounding. Records count the folds before a step, so that a replay folds at the
same steps. Under a Trainer, :class:`~zolightning.callbacks.ZerothOrder` chooses which.
"""

from collections.abc import Iterator

from torch import Tensor

from zolightning.directions.basis import Basis
from zolightning.kernels.compiled import chunk_size, chunks

_CHUNK = 2**20  # elements of a lift at a time, at least


def lift_in_pieces(basis: Basis, core: Tensor, weight: Tensor, first: int) -> Iterator[tuple[int, Tensor]]:
    """Computes the lift of a core for the elements of a weight, in flat pieces, each with the index of its first one.

    The weight may be this rank's rows, from element `first` of the parameter on. Rows are multiplied together at the
    same places whichever elements are wanted, because the rounding of one may depend on those multiplied with it.
    """
    one, other = basis.factors(core)
    columns, end = len(other), first + weight.numel()
    for part in chunks(len(one), max(1, max(_CHUNK, chunk_size(weight)) // columns)):
        start, stop = (min(max(row * columns, first), end) for row in (part.start, part.stop))
        if start < stop:
            product = (one[part] @ other.T).flatten()
            yield start - first, product[start - part.start * columns : stop - part.start * columns]
