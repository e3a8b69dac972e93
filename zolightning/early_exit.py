"""The first layers of a network in the place of all of them: its head reads what a middle layer writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from zolightning.layers import find_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUM_LAYERS = "num_layers_kept"  # attribute of a model that lost the others


def keep_first_layers(model: "PreTrainedModel", num_layers: int) -> None:
    """Takes all layers but the first ones out of a model; its config says so from then on, and it is saved as such.

    The norm before the head, if there is one, and the head stay. What such a model says means little before its head is
    fitted anew, since the head was trained for what the last layer writes.

    Raises:
        ValueError: the model has fewer layers, or an encoder and a decoder.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"`num_layers` is {num_layers!r}, and {type(model).__name__} has an encoder and a decoder: it must be null."
        )
    layers = _layers(model)
    before = len(layers)
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or not 1 <= num_layers <= before:
        raise ValueError(
            f"`num_layers` is {num_layers!r}, and {type(model).__name__} has {before} layers: 1 to {before} are "
            "accepted."
        )
    if num_layers == before:
        return
    del layers[num_layers:]
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        for name, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == before:  # an entry a layer, such as `layer_types`
                setattr(config, name, value[:num_layers])
        config.num_hidden_layers = num_layers
    setattr(model, _NUM_LAYERS, num_layers)


@contextmanager
def exit_after(model: "PreTrainedModel", num_layers: int) -> Iterator[None]:
    """Has a model run its first layers only, within a context; its config says nothing of it."""
    layers = _layers(model)
    others = list(layers)[num_layers:]
    del layers[num_layers:]
    try:
        yield
    finally:
        layers.extend(others)


def early_exit(model: "PreTrainedModel") -> int | None:
    """How many layers the model was left with, or None if it has all that it was loaded with."""
    return getattr(model, _NUM_LAYERS, None)


def restore_early_exit(model: "PreTrainedModel", num_layers: int | None) -> None:
    """Makes the model one that weights saved with this :func:`early_exit` fit.

    Raises:
        ValueError: the model has fewer layers than that.
    """
    found = early_exit(model)
    if num_layers is not None:
        keep_first_layers(model, num_layers)
    elif found is not None:
        raise ValueError(f"`num_layers` is {found}, and the weights to load are of all layers: leave it out.")


def _layers(model: "PreTrainedModel") -> nn.ModuleList:
    layers = model.get_submodule(find_layers(model).name)
    assert isinstance(layers, nn.ModuleList)
    return layers
