"""The base class of the scopes that choose layers."""

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L
from torch import nn

from zolightning.checks import require_integer
from zolightning.layers import LayerStack, find_layers
from zolightning.scopes.activation_profile import ActivationProfile, profile_activations
from zolightning.scopes.calibration import calibration_batches, calibration_forward
from zolightning.scopes.parts import Part, WholeLayer
from zolightning.scopes.scope import Scope, Selection


class ChosenLayers(NamedTuple):
    """Indices of layers, why they were chosen in a few words, and the figures behind it as a table."""

    layers: Sequence[int]
    reason: str
    details: str = ""


class LayerScope(Scope):
    """Abstract base of the scopes that choose layers and train the same part of each.

    The head of a classifier (:class:`~zolightning.models.classifier.Classifier`), usually a new one, trains as well.

    Args:
        part: which parameters of the layers train; all of them by default.
        layers_name: where the layers are, see :func:`~zolightning.layers.find_layers`; found by structure if not given.
        num_prompts: number of training examples to run if the choice, or the part, depends on activations.
    """

    def __init__(self, part: Part | None = None, layers_name: str | None = None, num_prompts: int = 32) -> None:
        super().__init__()
        require_integer("num_prompts", num_prompts)
        self.part = WholeLayer() if part is None else part
        self.layers_name = layers_name
        self.num_prompts = num_prompts

    @abstractmethod
    def choose(self, stack: LayerStack, profile: Callable[[], ActivationProfile]) -> ChosenLayers:
        """Chooses layers of `stack`; `profile` runs the network over the calibration prompts and measures them."""

    def check_layers(self, stack: LayerStack) -> None:
        """Raises a ValueError for layers that are named but do not exist."""

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stack = find_layers(pl_module, self.layers_name)
        self.check_layers(stack)
        self.part.check(pl_module, stack)

    def select(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Selection:
        forwards = 0

        @functools.cache
        def batches() -> Sequence[Any]:
            pl_module.to(trainer.strategy.root_device)
            return calibration_batches(trainer, pl_module, self.num_prompts)

        def counted() -> Iterator[Any]:
            nonlocal forwards
            for batch in batches():
                forwards += 1
                yield batch

        def calibrate() -> None:
            for batch in counted():
                calibration_forward(pl_module, batch)

        stack = find_layers(pl_module, self.layers_name)
        self.check_layers(stack)
        choice = self.choose(stack, lambda: profile_activations(pl_module, counted(), stack))
        choice = trainer.strategy.broadcast(choice)
        layers = sorted(set(choice.layers))
        parts = self.part.select(pl_module, stack, layers, calibrate)
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        head: Mapping[str, nn.Parameter] = getattr(pl_module, "head_parameters", {})
        also = ", and the head" if head else ""
        return Selection(
            parameters={names[parameter]: part for parameter, part in (parts | dict.fromkeys(head.values())).items()},
            reason=f"{self.part!r} of {_name(layers, len(stack))} (`{stack.name}`), {choice.reason}{also}",
            layers=tuple(layers),
            details=choice.details,
            forward_passes=forwards,
        )


def _name(layers: Sequence[int], total: int) -> str:
    if len(layers) == total > 1:
        return f"all {total} layers"
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))} of {total}"
