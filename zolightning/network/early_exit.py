"""Early exit: keeps only the first layers of a network, so that its head reads the output of a middle layer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from zolightning.evaluation.replaced import replaced_forwards
from zolightning.layers import find_layers
from zolightning.messages import counted, differing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

_NUM_LAYERS = "num_layers_kept"  # attribute of a model that lost the others


def keep_first_layers(model: "PreTrainedModel", num_layers: int) -> None:
    """Removes all layers of a model but the first ones, and changes its config, with which it is saved.

    The head stays, and the norm before it, if there is one. The model's predictions mean little until its head is
    fitted anew, because the head was trained on the output of the last layer.

    Raises:
        ValueError: the model has fewer layers, or an encoder and a decoder, or no config describes what is left of it.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"`num_layers` is {num_layers!r}, but {type(model).__name__} has an encoder and a decoder: it must be null."
        )
    layers = _layers(model)
    before = len(layers)
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or not 1 <= num_layers <= before:
        raise ValueError(
            f"`num_layers` is {num_layers!r}, but {type(model).__name__} has {counted(before, 'layer')}: 1 to {before} "
            "are accepted."
        )
    if num_layers == before:
        return
    del layers[num_layers:]
    try:
        _shorten_config(model, before, num_layers)
        is_network = _makes_again(model)
    except Exception:  # whatever a config raises that accepts no such number
        is_network = False
    if not is_network:
        raise ValueError(
            f"`num_layers` is {num_layers!r}, but the first layers of a {type(model).__name__} are no network by "
            "themselves: what they compute depends on how many follow. It must be null."
        )
    setattr(model, _NUM_LAYERS, num_layers)


def _shorten_config(model: "PreTrainedModel", before: int, num_layers: int) -> None:
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        for name, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == before:  # an entry a layer, such as `layer_types`
                setattr(config, name, value[:num_layers])
        config.num_hidden_layers = num_layers


def _makes_again(model: "PreTrainedModel") -> bool:
    """Whether a model's config, read anew, makes the same network.

    Not so where each layer has a part of a table, is scaled by the number of layers, or is of another kind if it is one
    of the last.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    with torch.device("meta"):
        made = type(model)(config)
    shapes = [{name: tuple(weight.shape) for name, weight in each.state_dict().items()} for each in (model, made)]
    return not differing(*shapes) and all(
        _settings(again).items() <= _settings(model.get_submodule(name)).items() for name, again in made.named_modules()
    )


def _settings(module: nn.Module) -> dict[str, bool | float]:
    """The attributes that tell what a module computes, such as whether it has a window."""
    found = {name: value for name, value in vars(module).items() if isinstance(value, bool | float)}
    return {name: value for name, value in found.items() if name != "training" and not name.startswith("_")}


def at_each_exit(model: "PreTrainedModel", exits: Sequence[int], run: Callable[[], T]) -> list[T]:
    """Calls `run` once for each exit, with a model that ends after that many layers, and returns the results in order.

    The layers themselves run only once, in the call for the last exit. In the other calls each layer returns a stored
    output at once, so that such a call costs only what comes before and after the layers. The config does not change.
    The output of one layer for each exit is kept in memory meanwhile. The largest of the exits is the last.
    """
    layers = _layers(model)
    outputs: dict[nn.Module, Any] = {}
    with ExitStack() as hooks, _exit_after(layers, exits[-1]):
        for count in exits[:-1]:
            hook = layers[count - 1].register_forward_hook(lambda layer, _, output: outputs.update({layer: output}))
            hooks.enter_context(hook)
        last = run()
    found = []
    for count in exits[:-1]:
        recalled = partial(_forward_to, outputs[layers[count - 1]])
        with _exit_after(layers, count), replaced_forwards(layers, recalled):
            found.append(run())
    return [*found, last]


def _forward_to(output: Any, layer: nn.Module) -> Callable[..., Any]:
    return lambda *_, **__: output


@contextmanager
def _exit_after(layers: nn.ModuleList, num_layers: int) -> Iterator[None]:
    """A context in which only the first layers are left."""
    others = list(layers)[num_layers:]
    del layers[num_layers:]
    try:
        yield
    finally:
        layers.extend(others)


def early_exit(model: "PreTrainedModel") -> int | None:
    """The number of layers that :func:`keep_first_layers` has left, or None if the model has all its layers."""
    return getattr(model, _NUM_LAYERS, None)


def restore_early_exit(model: "PreTrainedModel", num_layers: int | None) -> None:
    """Gives the model the structure of weights that were saved with this :func:`early_exit`.

    Raises:
        ValueError: the model has fewer layers than that.
    """
    if num_layers is not None:
        keep_first_layers(model, num_layers)
    elif (found := early_exit(model)) is not None:
        raise ValueError(f"`num_layers` is {found}, but the weights to load are of all layers: leave it out.")


def _layers(model: "PreTrainedModel") -> nn.ModuleList:
    layers = model.get_submodule(find_layers(model).name)
    assert isinstance(layers, nn.ModuleList)
    return layers
