"""Rules that choose the dominant layer from an activation profile."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from zolightning.scopes.activation_profile import ActivationProfile, LayerStatistics


def _require_above(least: float, name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least < value < math.inf:
        raise ValueError(f"`{name}` must be a number above {least}, got {value!r}.")


class Rule(ABC):
    """Abstract base of the rules: a callable that chooses one layer, or none."""

    @abstractmethod
    def __call__(self, profile: ActivationProfile) -> int | None:
        """The index of the chosen layer, or None where no layer stands out."""


class Criterion(Rule):
    """A rule that looks at one layer at a time and chooses the first that meets it."""

    @abstractmethod
    def holds(self, layer: LayerStatistics) -> bool:
        """Whether a layer stands out."""

    def __call__(self, profile: ActivationProfile) -> int | None:
        return next((index for index, layer in enumerate(profile.layers) if self.holds(layer)), None)


@dataclass(frozen=True)
class Absolute(Criterion):
    """The first layer whose maximum exceeds `threshold`."""

    threshold: float = 100.0

    def __post_init__(self) -> None:
        _require_above(0, "threshold", self.threshold)

    def holds(self, layer: LayerStatistics) -> bool:
        return layer.max > self.threshold


@dataclass(frozen=True)
class RatioToMedian(Criterion):
    """The first layer whose maximum is at least `ratio` times its median."""

    ratio: float = 1000.0

    def __post_init__(self) -> None:
        _require_above(0, "ratio", self.ratio)

    def holds(self, layer: LayerStatistics) -> bool:
        return layer.max >= self.ratio * layer.median > 0


@dataclass(frozen=True)
class Both(Criterion):
    """The first layer that meets two criteria.

    ``Both(Absolute(100), RatioToMedian(1000))`` is the definition of a massive activation (Sun et al. 2024,
    arXiv 2402.17762).
    """

    one: Criterion
    other: Criterion

    def holds(self, layer: LayerStatistics) -> bool:
        return self.one.holds(layer) and self.other.holds(layer)


@dataclass(frozen=True)
class Jump(Rule):
    """The layer whose maximum exceeds that of the layer before by the largest factor, if that is at least `ratio`.

    Args:
        ratio: the least factor.
        first_half_only: consider only layers up to index n/2 of n. Dominant layers are early ones (Dominant-Layer ZO,
            arXiv 2606.05516: 1 of 32, 6 of 36), and in many models the last layers have large jumps as well.
    """

    ratio: float = 5.0
    first_half_only: bool = True

    def __post_init__(self) -> None:
        _require_above(1, "ratio", self.ratio)

    def __call__(self, profile: ActivationProfile) -> int | None:
        maxima = [layer.max for layer in profile.layers]
        last = len(maxima) // 2 if self.first_half_only else len(maxima) - 1
        jumps = {i: maxima[i] / maxima[i - 1] for i in range(1, last + 1) if maxima[i - 1] > 0}
        best = max(jumps, key=jumps.__getitem__, default=None)
        return best if best is not None and jumps[best] >= self.ratio else None


DEFAULT_RULES: tuple[Rule, ...] = (Both(Absolute(), RatioToMedian()), Jump())


def select(profile: ActivationProfile, rules: Sequence[Rule] = DEFAULT_RULES) -> tuple[int, str]:
    """The layer chosen by the first rule that chooses one, and that rule, as text.

    Raises:
        ValueError: if none does, with the whole profile.
    """
    for rule in rules:
        if (layer := rule(profile)) is not None:
            return layer, str(rule)
    raise ValueError(
        f"No layer stands out by `rules` {', '.join(map(str, rules)) or '(none)'}: give looser ones, or choose a "
        f"`layer` yourself.\n{profile.table()}"
    )
