"""Low-rank perturbations that share a core, each with its own signs for the rows and columns (GRZO)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from zolightning.directions.basis import Basis
from zolightning.directions.dense import Negated
from zolightning.directions.low_rank import LowRank


class Signed(LowRank):
    """Adds the lift of ``pending + factor * core * (rows columns')`` to a weight.

    Args:
        basis, shape, pending: see :class:`~zolightning.directions.low_rank.LowRank`.
        core: the core that all perturbations of the matrix share, float32 or wider.
        signs: 1 or -1 for each row of the core and then for each column, (rows + columns,), any dtype.
        factor: multiplies the core.
    """

    def __init__(
        self, basis: Basis, shape: tuple[int, int], pending: Tensor | None, core: Tensor, signs: Tensor, factor: float
    ) -> None:
        super().__init__(basis, shape, pending, None)
        self.core = core
        self.signs = signs
        self.factor = factor

    def opposite(self, negated: Negated) -> "Signed":
        return Signed(self.basis, self.shape, self.pending, self.core, self.signs, -self.factor)

    @staticmethod
    def write_cores(groups: Sequence[LowRank], outs: Tensor) -> None:
        """As :meth:`LowRank.write_cores`; all cores are written at once if all groups are signed, with one factor."""
        found = [group for group in groups if isinstance(group, Signed)]
        if len(found) < len(groups) or any(group.factor != found[0].factor for group in found):
            LowRank.write_cores(groups, outs)
            return
        core, pending = found[0].core, found[0].pending
        rows, columns = torch.stack([group.signs for group in found]).split(list(core.shape), dim=1)
        changes = core * rows[:, :, None] * columns[:, None]
        if pending is None:
            pending = torch.zeros_like(core)
        outs.copy_(torch.add(pending, changes, alpha=found[0].factor))

    def write_core(self, out: Tensor) -> Tensor:
        rows, columns = self.signs.split(list(self.core.shape))
        change = self.core * rows[:, None] * columns
        pending = torch.zeros_like(change) if self.pending is None else self.pending
        return out.copy_(torch.add(pending, change, alpha=self.factor))
