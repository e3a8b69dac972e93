"""Finds the layers of a network, and the MLP of a layer, by structure rather than by names."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

from torch import nn

from zolightning.messages import counted


@dataclass(frozen=True)
class LayerStack:
    """The repeated layers of a network, in the order in which they run."""

    name: str  # dotted name of the list that holds them, or the regular expression that found them
    names: tuple[str, ...]  # dotted name of each layer
    layers: tuple[nn.Module, ...]  # the layers themselves

    def __len__(self) -> int:
        return len(self.layers)

    def parameters(self, index: int) -> dict[str, nn.Parameter]:
        """The parameters of a layer, by their dotted names in the whole module."""
        prefix = self.names[index]
        return {f"{prefix}.{name}": parameter for name, parameter in self.layers[index].named_parameters()}


def find_layers(module: nn.Module, name: str | None = None) -> LayerStack:
    """Finds the layers of a transformer, or of anything else that keeps its layers in an ``nn.ModuleList``.

    Of the lists that are in no other list, the one with the most parameters holds the layers.

    Args:
        module: the network, or a module around it.
        name: where to look instead: a regular expression that must match a whole dotted name. Where it matches one
            ``nn.ModuleList`` or ``nn.Sequential``, the layers are its members, otherwise the matches themselves.

    Raises:
        ValueError: if there are no such layers, with what there is instead.
    """
    if name is not None:
        return _find_by_name(module, name)
    lists: dict[str, nn.ModuleList] = {}
    for path, submodule in module.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(submodule, nn.ModuleList) and not nested and _size(submodule):
            lists[path] = submodule
    if not lists:
        children = ", ".join(f"`{path}` ({type(child).__name__})" for path, child in module.named_children())
        raise ValueError(
            f"`layers_name` is not given, and {type(module).__name__} has no nn.ModuleList of layers; it holds "
            f"{children or 'no modules'}. Name the nn.Sequential that holds the layers, or give a regular expression "
            "that matches the dotted name of each layer."
        )
    return _members(max(lists, key=lambda path: _size(lists[path])), lists)


def _find_by_name(module: nn.Module, name: str) -> LayerStack:
    try:
        pattern = re.compile(name)
    except re.error as error:
        raise ValueError(f"`layers_name` is '{name}', which is not a regular expression: {error}.") from None
    found = {path: submodule for path, submodule in module.named_modules() if path and pattern.fullmatch(path)}
    if len(found) == 1 and isinstance(next(iter(found.values())), nn.ModuleList | nn.Sequential):
        return _members(next(iter(found)), found)
    nested = [path for path in found if any(path.startswith(f"{outer}.") for outer in found)]
    if len(found) < 2 or nested:
        problem = f"`{nested[0]}` inside another match" if nested else f"{', '.join(found) or 'nothing'}"
        lists = [path for path, m in module.named_modules() if path and isinstance(m, nn.ModuleList | nn.Sequential)]
        raise ValueError(
            f"`layers_name` is '{name}', which matches {problem} in {type(module).__name__}. Accepted are one list "
            f"({', '.join(lists) or 'there is none'}) or several modules, none inside another."
        )
    return LayerStack(name, tuple(found), tuple(found.values()))


def _members(path: str, lists: dict[str, Any]) -> LayerStack:
    layers = dict(lists[path].named_children())
    return LayerStack(path, tuple(f"{path}.{key}" for key in layers), tuple(layers.values()))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def check_index(stack: LayerStack, index: int, field: str = "layer") -> None:
    """Raises a ValueError with the accepted range unless `index` is a layer of the stack; it names `field`."""
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(stack):
        raise ValueError(
            f"`{field}` is {index!r}, but `{stack.name}` has {counted(len(stack), 'layer')}: 0 to {len(stack) - 1} are "
            "accepted."
        )


class FeedForward(NamedTuple):
    """The feed-forward part of a layer; its channel j is entry j of what `down` reads."""

    up: tuple[nn.Linear, ...]  # the linear maps that write the channels: two in a gated MLP, one in a plain one
    down: nn.Linear  # the linear map that reads them

    @property
    def width(self) -> int:
        """The number of channels."""
        return _features(self.down)[0]

    def parameters(self) -> list[nn.Parameter]:
        """Weights and biases."""
        return [parameter for linear in (*self.up, self.down) for parameter in linear.parameters()]

    def channel_dims(self) -> dict[nn.Parameter, int]:
        """The dimension along which channels lie in each parameter that has them: all but the bias of `down`."""
        dims = {linear.weight: _output_dim(linear) for linear in self.up}
        dims |= {linear.bias: 0 for linear in self.up if linear.bias is not None}
        dims |= {self.down.weight: 1 - _output_dim(self.down)}
        return dims  # type: ignore[return-value]  # torch declares the weight of a linear map as a Tensor


def mlp_of(layer: nn.Module) -> FeedForward:
    """Finds the MLP of a layer: linear maps outside attention that go from its width to another one, and back.

    Linear maps are ``nn.Linear`` and the ``Conv1D`` of transformers, whose weight is transposed. Attention is any
    submodule whose class has "Attention" in its name.

    Raises:
        ValueError: if there is no such pair, or more than one, as in a mixture of experts.
    """
    linears = dict(_linears_outside_attention(layer))
    for down in reversed(linears.values()):  # what goes up is registered before what comes down
        width, hidden = _features(down)
        up = tuple(linear for linear in linears.values() if linear is not down and _features(linear) == (hidden, width))
        if up:
            break
    else:
        up = ()
    experts = len(up) > 2 or any(parameter.ndim > 2 for parameter in layer.parameters())
    if not up or experts:
        shapes = [f"`{name}` {' to '.join(map(str, _features(linear)))}" for name, linear in linears.items()]
        raise ValueError(
            f"`part` needs a layer with one MLP: one or two linear maps up and one down. {type(layer).__name__} has "
            f"outside attention: {', '.join(shapes) or 'no linear maps'}{' (a mixture of experts)' if experts else ''}."
        )
    return FeedForward(up, down)


def _linears_outside_attention(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Linear]]:
    for name, child in module.named_children():
        if "Attention" in type(child).__name__:
            continue
        if isinstance(child, nn.Linear) or is_conv1d(child):
            yield path + name, child
        yield from _linears_outside_attention(child, f"{path}{name}.")


def is_conv1d(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a ``Conv1D`` of transformers, which has the attributes of a linear map.

    It is recognised by its name, because transformers need not be installed.
    """
    return any(
        f"{cls.__module__}.{cls.__name__}" == "transformers.pytorch_utils.Conv1D" for cls in type(module).__mro__
    )


def _output_dim(linear: nn.Module) -> int:
    return 0 if isinstance(linear, nn.Linear) else 1


def _features(linear: nn.Linear) -> tuple[int, int]:
    """Input and output features."""
    if isinstance(linear, nn.Linear):  # whose weight may be packed
        return linear.in_features, linear.out_features
    return linear.weight.shape
