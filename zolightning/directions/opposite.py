"""Perturbations of the opposite sign: those of ``W - eps z``, derived from those of ``W + eps z``."""

from collections.abc import ItemsView, Iterator, Mapping
from functools import cached_property
from typing import Any

from torch import nn

from zolightning.directions.dense import Coefficients, Direction, negated
from zolightning.directions.perturbation import Perturbation

Changes = Mapping[nn.Parameter, Perturbation | None]


def have_opposites(changes: Changes) -> bool:
    """Whether all of these perturbations have an ``opposite``."""
    return all(hasattr(kind, "opposite") for kind in set(map(type, changes.values())) - {type(None)})


class Opposite(Mapping[nn.Parameter, Any]):
    """Some perturbations with their directions negated, which are all made when the first one is asked for.

    Evaluations with CUDA graphs never ask: a graph needs the negated coefficients only.

    Args:
        of: perturbations by parameter, None where there is none; :func:`have_opposites` must hold for them.
    """

    def __init__(self, of: Changes) -> None:
        self.of = of
        self._coefficients: dict[int, Coefficients] = {}  # by the id of those that they negate

    def negated(self, direction: Direction) -> Coefficients:
        """The coefficients of a direction's opposite: one tensor for all directions that share theirs."""
        found = self._coefficients.get(id(direction.coefficients))
        if found is None:
            found = self._coefficients[id(direction.coefficients)] = negated(direction)
        return found

    @cached_property
    def _made(self) -> dict[nn.Parameter, Any]:
        changes: Mapping[nn.Parameter, Any] = self.of
        return {p: None if change is None else change.opposite(self.negated) for p, change in changes.items()}

    def __getitem__(self, parameter: nn.Parameter) -> Any:
        return self._made[parameter]

    def items(self) -> ItemsView[nn.Parameter, Any]:
        return self._made.items()

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self.of)

    def __len__(self) -> int:
        return len(self.of)
