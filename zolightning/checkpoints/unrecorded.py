"""Watches the settings that records of steps do not hold: if one changes in mid-run, the ledger must end."""

from operator import attrgetter
from typing import Any

from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.settings import constructor_arguments

_SET_LATER = {"transport", "anchor", "left_state"}  # hyperparameters that callbacks set
_RECORDED = {"params", "lr", "seed"}
_REQUIRES_GRAD = attrgetter("requires_grad")


class Unrecorded:
    """The hyperparameters of an optimizer that are not in its records, and which of its parameters train.

    Args:
        optimizer: the one whose values are kept, to be compared with later ones.
    """

    def __init__(self, optimizer: ZerothOrderOptimizer) -> None:
        self._names = (constructor_arguments(type(optimizer)) | _SET_LATER) - _RECORDED
        self._values = self._of(optimizer)

    def change(self, optimizer: ZerothOrderOptimizer) -> str | None:
        """What has changed since, in words; None if nothing has."""
        values = self._of(optimizer)
        if values == self._values:
            return None
        pairs = zip(values, self._values, strict=False)
        names = sorted({name for now, then in pairs for name in now if now[name] != then.get(name)})
        return f"`{names[0]}` of a parameter group changed" if names else "a parameter group was added"

    def _of(self, optimizer: ZerothOrderOptimizer) -> list[dict[str, Any]]:
        """The values of each parameter group."""
        return [
            {name: group[name] for name in self._names & group.keys()}
            | {"requires_grad": list(map(_REQUIRES_GRAD, group["params"]))}
            for group in optimizer.param_groups
        ]
