"""Trains a layer drawn at random: the control for the dominant layer."""

from collections.abc import Callable
from typing import Any

from zolightning.checks import require_seed
from zolightning.kernels.noise import key
from zolightning.layers import LayerStack
from zolightning.scopes.activation_profile import ActivationProfile
from zolightning.scopes.layer_scope import ChosenLayers, LayerScope
from zolightning.scopes.parts import Part


class RandomLayer(LayerScope):
    """Trains one layer only, drawn at random: the control that the choice of a dominant layer has to beat.

    The draw depends on the seed and the number of layers only, not on torch's generators.

    Args:
        part: which parameters of the layer train; all of them by default.
        seed: seed of the draw.
        **settings: those of :class:`~zolightning.scopes.layer_scope.LayerScope`.
    """

    def __init__(self, part: Part | None = None, seed: int = 0, **settings: Any) -> None:
        super().__init__(part, **settings)
        require_seed(seed)
        self.seed = seed

    def choose(self, stack: LayerStack, profile: Callable[[], ActivationProfile]) -> ChosenLayers:
        return ChosenLayers((key(self.seed, 0, 0, "layer")[0] % len(stack),), f"drawn with seed {self.seed}")
