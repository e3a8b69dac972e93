"""Trains layers by their numbers."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from zolightning.layers import LayerStack, check_index
from zolightning.scopes.activation_profile import ActivationProfile
from zolightning.scopes.layer_scope import ChosenLayers, LayerScope
from zolightning.scopes.parts import Part


class TrainLayers(LayerScope):
    """Trains the given layers only, or a part of each.

    Args:
        layers: indices from 0, or "all".
        part: which parameters of the layers train; all of them by default.
        **settings: those of :class:`~zolightning.scopes.layer_scope.LayerScope`.

    Example::

        callbacks = [TrainLayers("all", part=LoRA(rank=8)), ZerothOrder(partial(MeZO, lr=1e-5))]
    """

    def __init__(self, layers: Sequence[int] | Literal["all"], part: Part | None = None, **settings: Any) -> None:
        super().__init__(part, **settings)
        if not layers or (isinstance(layers, str) and layers != "all"):
            raise ValueError(f"`layers` must be a list of at least one index, or 'all', got {layers!r}.")
        self.layers = layers

    def check_layers(self, stack: LayerStack) -> None:
        for index in () if isinstance(self.layers, str) else self.layers:
            check_index(stack, index, "layers")

    def choose(self, stack: LayerStack, profile: Callable[[], ActivationProfile]) -> ChosenLayers:
        return ChosenLayers(range(len(stack)) if isinstance(self.layers, str) else tuple(self.layers), "as given")
