"""Trains the layer with abnormally large activations."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zolightning.layers import LayerStack, check_index
from zolightning.scopes.activation_profile import ActivationProfile, Fingerprint
from zolightning.scopes.layer_scope import ChosenLayers, LayerScope
from zolightning.scopes.parts import Part
from zolightning.scopes.rules import DEFAULT_RULES, Rule, select


class DominantLayer(LayerScope):
    """Trains one layer only: the first whose output activations are abnormally large (arXiv 2606.05516).

    Before training the network runs on a few training prompts, and the first of `rules` that finds a layer decides.
    Which layer it is depends more on the model than on the task.

    Args:
        part: which parameters of the layer train; all of them by default.
        extra_layers: indices of other layers that train too.
        rules: how to choose, in order of preference. Default: the first layer with massive activations (above 100 and
            1000 times the median), or else the layer with the largest jump of the maximum in the first half of the
            network, if that is at least fivefold.
        profile: a file written by ``zolightning profile``, to use instead of running the network.
        layer: index of the layer, from 0, if it is known already.
        **settings: those of :class:`~zolightning.scopes.layer_scope.LayerScope`.

    Raises:
        ValueError: before training, naming an argument; or with the whole profile if no rule finds a layer.

    Example::

        callbacks = [DominantLayer(), ZerothOrder(partial(MeZO, lr=1e-6))]
    """

    def __init__(
        self,
        part: Part | None = None,
        extra_layers: Sequence[int] = (),
        rules: Sequence[Rule] | None = None,
        *,
        profile: str | None = None,
        layer: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(part, **settings)
        if layer is not None and profile is not None:
            raise ValueError(f"`layer` is {layer} and `profile` is {profile!r}: give one of them.")
        self.extra_layers = extra_layers
        self.rules = DEFAULT_RULES if rules is None else rules
        self.profile = profile
        self.layer = layer

    def check_layers(self, stack: LayerStack) -> None:
        for index in self.extra_layers:
            check_index(stack, index, "extra_layers")
        if self.layer is not None:
            check_index(stack, self.layer)
        if self.profile is not None:
            _load(self.profile, Fingerprint.of(stack))

    def choose(self, stack: LayerStack, profile: Callable[[], ActivationProfile]) -> ChosenLayers:
        if self.layer is not None:
            return ChosenLayers((self.layer, *self.extra_layers), "as given")
        measured = profile() if self.profile is None else _load(self.profile, Fingerprint.of(stack))
        layer, rule = select(measured, self.rules)
        also = f", with extra layers {', '.join(map(str, self.extra_layers))}" if self.extra_layers else ""
        return ChosenLayers((layer, *self.extra_layers), f"layer {layer} chosen by {rule}{also}", measured.table())


def _load(path: str, fingerprint: Fingerprint) -> ActivationProfile:
    if not Path(path).is_file():
        raise ValueError(f"`profile` is {path!r}, which is not a file. Write one with `zolightning profile`.")
    try:
        profile = ActivationProfile.load(path)
    except ValueError as error:
        raise ValueError(f"`profile` is {path!r}, which is {error}.") from None
    if profile.fingerprint != fingerprint:
        raise ValueError(
            f"`profile` is {path!r}, of another model: {profile.fingerprint}. This one has {fingerprint}. Write a "
            "profile of this model with `zolightning profile`, or leave `profile` out."
        )
    return profile
