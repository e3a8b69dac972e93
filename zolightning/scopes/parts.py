"""Which part of the chosen layers trains: all of it, the MLP, some channels, or adapters."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.checks import require_integer, require_positive, require_share
from zolightning.directions.slices import Slice
from zolightning.layers import LayerStack, mlp_of
from zolightning.network.adapters import (
    adaptable,
    adapter_parameters,
    adapter_settings,
    add_adapter,
    default_targets,
    differences,
    lora_settings,
)
from zolightning.scopes.token_mask import TokenMask

ChosenParameters = dict[nn.Parameter, Slice | None]


class Part(ABC):
    """Chooses parameters, or slices of them, in layers."""

    @abstractmethod
    def select(
        self, module: nn.Module, stack: LayerStack, indices: Sequence[int], calibrate: Callable[[], None]
    ) -> ChosenParameters:
        """The chosen parameters, each with its slice, or None if it trains as a whole.

        Args:
            module: owns the layers.
            stack: all layers.
            indices: those that were chosen.
            calibrate: runs the network on the calibration prompts; call it only if activations are needed.
        """

    def check(self, module: nn.Module, stack: LayerStack) -> None:  # noqa: B027 (most parts are of any layer)
        """Raises a ValueError if no layer of the stack has this part, as far as that is known without running it."""

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


class WholeLayer(Part):
    """All parameters of a layer: attention, MLP and norms."""

    def select(
        self, module: nn.Module, stack: LayerStack, indices: Sequence[int], calibrate: Callable[[], None]
    ) -> ChosenParameters:
        return {parameter: None for index in indices for parameter in stack.parameters(index).values()}


class MLP(Part):
    """The linear maps of a layer outside attention: up (and gate) and down, with their biases."""

    def select(
        self, module: nn.Module, stack: LayerStack, indices: Sequence[int], calibrate: Callable[[], None]
    ) -> ChosenParameters:
        return {parameter: None for index in indices for parameter in mlp_of(stack.layers[index]).parameters()}


class OutlierChannels(Part):
    """The channels of a layer's MLP with the largest activations on the calibration prompts.

    Of I channels, the ``ceil(fraction * I)`` with the largest absolute values at the input of the down projection are
    chosen. In a gated MLP a channel is a row of the gate and up projections and a column of the down projection, so k
    channels have 3Hk weights (Dominant-Layer ZO, arXiv 2606.05516). Biases of gate and up belong to their channels.

    Args:
        fraction: share of the channels that train, above 0 and at most 1.
    """

    def __init__(self, fraction: float = 0.01) -> None:
        require_share("fraction", fraction)
        self.fraction = fraction

    def select(
        self, module: nn.Module, stack: LayerStack, indices: Sequence[int], calibrate: Callable[[], None]
    ) -> ChosenParameters:
        channels = outlier_channels(module, stack, indices, self.fraction, calibrate)
        return {
            parameter: Slice(dim, channels[index])
            for index in indices
            for parameter, dim in mlp_of(stack.layers[index]).channel_dims().items()
        }


class WithoutOutlierChannels(Part):
    """A layer, or its MLP, without the weights that :class:`OutlierChannels` would train.

    Args:
        fraction: share of the channels to leave out, above 0 and at most 1.
        within: `WholeLayer()`, which is the default, or `MLP()`.
    """

    def __init__(self, fraction: float = 0.01, within: Part | None = None) -> None:
        require_share("fraction", fraction)
        self.fraction = fraction
        self.within = WholeLayer() if within is None else within
        if not isinstance(self.within, WholeLayer | MLP):
            raise ValueError(f"`within` must be WholeLayer() or MLP(), got {within!r}.")

    def select(
        self, module: nn.Module, stack: LayerStack, indices: Sequence[int], calibrate: Callable[[], None]
    ) -> ChosenParameters:
        channels = outlier_channels(module, stack, indices, self.fraction, calibrate)
        selected = self.within.select(module, stack, indices, calibrate)
        for index in indices:
            mlp = mlp_of(stack.layers[index])
            others = torch.ones(mlp.width, dtype=torch.bool).index_fill(0, channels[index], False).nonzero().flatten()
            for parameter, dim in mlp.channel_dims().items():
                if len(others):
                    selected[parameter] = Slice(dim, others)
                else:
                    del selected[parameter]
        return selected


class LoRA(Part):
    """LoRA adapters, made by PEFT, on linear maps of the layers; only they train (Hu et al. 2021, arXiv 2106.09685).

    For models of transformers only.

    Args:
        rank: rank of an adapter.
        alpha: the output of an adapter is multiplied by ``alpha / rank``.
        target_modules: the linear maps with an adapter, by the last part of their names, such as ``[q_proj, v_proj]``.
            Default: those that PEFT chooses for the architecture, usually query and value.
    """

    def __init__(self, rank: int = 8, alpha: float = 16.0, target_modules: list[str] | None = None) -> None:
        require_integer("rank", rank)
        require_positive("alpha", alpha)
        if target_modules is not None and not target_modules:
            raise ValueError("`target_modules` is empty: name at least one linear map, or leave it out.")
        self.rank = rank
        self.alpha = alpha
        self.target_modules = target_modules

    def check(self, module: nn.Module, stack: LayerStack) -> None:
        _, model = model_around(self, module, stack)
        refused: list[ValueError] = []
        for index in range(len(stack)):  # which differ in some networks
            try:
                self._targets(model, stack, index)
            except ValueError as error:
                refused.append(error)
        if len(refused) == len(stack):
            raise refused[0]

    def select(
        self, module: nn.Module, stack: LayerStack, indices: Sequence[int], calibrate: Callable[[], None]
    ) -> ChosenParameters:
        path, model = model_around(self, module, stack)
        names = [name for index in indices for name in self._targets(model, stack, index)]
        require_adapter(self, model, self.rank, self.alpha, [name.removeprefix(path) for name in names])
        return dict.fromkeys(adapter_parameters(model))

    def _targets(self, model: Any, stack: LayerStack, index: int) -> list[str]:
        """The dotted names of the linear maps of a layer that have an adapter."""
        model_type = model.config.model_type
        targets = self.target_modules or default_targets(model_type)
        linears = [name for name, submodule in stack.layers[index].named_modules() if adaptable(submodule)]
        found = [name for name in linears if any(f".{name}".endswith(f".{target}") for target in targets)]
        missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in found)]
        if not found or missing:
            problem = f"matches nothing for {', '.join(missing)}" if missing else f"has no default for {model_type}"
            raise ValueError(
                f"`target_modules` {problem} in layer {index} of `{stack.name}`. Its linear maps are "
                f"{', '.join(linears) or '(none)'}."
            )
        return [f"{stack.names[index]}.{name}" for name in found]


def outlier_channels(
    module: nn.Module, stack: LayerStack, indices: Sequence[int], fraction: float, calibrate: Callable[[], None]
) -> dict[int, Tensor]:
    """The outlier channels of the MLP of each layer: increasing indices, int64, on the CPU.

    Raises:
        ValueError: if an MLP does not run, or its values are not finite.
    """
    largest: dict[int, Tensor] = {}
    with TokenMask(module, stack) as mask, ExitStack() as hooks:
        for index in indices:

            def record(_: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
                values = args[0].detach()
                values = values[mask.of(values)].abs().float()  # (tokens, channels)
                if len(values):
                    maxima = values.amax(dim=0)
                    largest[index] = torch.maximum(largest[index], maxima) if index in largest else maxima

            hooks.enter_context(mlp_of(stack.layers[index]).down.register_forward_pre_hook(record))
        calibrate()
    channels: dict[int, Tensor] = {}
    for index in indices:
        if index not in largest or not torch.isfinite(largest[index]).all():
            problem = "are not finite: use bfloat16 or float32" if index in largest else "never ran"
            raise ValueError(f"The channels of the MLP of layer {index} of `{stack.name}` {problem}.")
        count = max(1, math.ceil(fraction * len(largest[index]) - 1e-9))  # 0.07 * 100 is above 7
        channels[index] = largest[index].cpu().sort(descending=True, stable=True).indices[:count].sort().values
    return channels


def model_around(part: Part, module: nn.Module, stack: LayerStack) -> tuple[str, Any]:
    """The outermost model of transformers that holds the layers, and the prefix of its names in `module`.

    Raises:
        ValueError: if there is none, naming the part that needs one.
    """
    from transformers import PreTrainedModel

    for path, submodule in module.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(submodule, PreTrainedModel) and all(name.startswith(prefix) for name in stack.names):
            return prefix, submodule
    raise ValueError(
        f"`part` is {type(part).__name__}, which needs a PreTrainedModel of transformers around `{stack.name}`, but "
        f"{type(module).__name__} has none."
    )


def require_adapter(part: Part, model: Any, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Adds an adapter to the linear maps of these names in a model, unless it has that one; a ValueError for others."""
    wanted = lora_settings(rank, alpha, list(targets))
    present = adapter_settings(model)
    if present is None:
        add_adapter(model, wanted)
    elif present != wanted:
        raise ValueError(
            f"`part` is {part!r}, but the model has another adapter already: {differences(present, wanted)}. Load the "
            "model again, or train the adapter that it has, without a scope."
        )
