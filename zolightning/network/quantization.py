"""Linear maps with weights of 8 or 4 bits: codes that never change, and scales that may train.

Only weights are quantised: a linear map dequantises its weight to the dtype of its input when it runs, and activations
stay as they are. LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339) rounds activations as well, which makes the loss a
step function of the weights: with ``eps`` 1e-3 the projected gradients of a layer of SmolLM2-135M were off by 2.6 times
their RMS.

The model is a frozen base for adapters, or for training a few layers; or its scales train alone, as in QZO (Shang et
al. 2025, arXiv 2505.13430): ``TrainParameters([r"weight_scale$"])`` names them. If a scope chooses quantised weights
themselves, they are restored from a copy, which is kept in host memory until the first fit begins. A scope that chooses
them all is refused.
"""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal, TypedDict, cast, get_args

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

Quantization = Literal["int8", "nf4"]


class QuantizationSettings(TypedDict):
    """Which maps of a module are quantised: plain values, for checkpoints."""

    kind: Quantization
    modules: list[str]  # dotted names, sorted


class QuantizedLinear(nn.Linear, ABC):
    """Abstract base of linear maps with a quantised weight, whose codes cannot train.

    Attributes:
        weight: the codes, integers.
        weight_scale: the factors of the codes. Until they train they are bfloat16 numbers whatever the module's dtype,
            so that no precision of a Trainer changes them.
        original: the linear map that this one was made from; None once it has been forgotten.

    Args:
        linear: the map to quantise. It shares its bias with this one.
    """

    kind: ClassVar[Quantization]
    weight_scale: nn.Parameter

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        codes, scale = self.quantize(linear.weight.detach())
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale.to(linear.weight.dtype), linear.weight.requires_grad)
        self.bias = linear.bias
        self.original: nn.Linear | None
        self.keep(linear)

    @staticmethod
    @abstractmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales, these bfloat16 numbers, of a weight of shape (out, in)."""

    @abstractmethod
    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for, of shape (out, in)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.dequantized(input.dtype), self.bias)

    def keep(self, original: nn.Linear | None) -> None:
        """Sets `original` past ``nn.Module``: it is no submodule, which would be moved to devices and saved."""
        vars(self)["original"] = original

    def plain(self) -> nn.Linear:
        """An ordinary linear map to replace this one, with its original weight if kept, else the dequantised one."""
        dtype, device = self.weight_scale.dtype, self.weight.device
        if self.original is not None:
            return self.original.to(device=device, dtype=dtype)
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantized(dtype))
        linear.bias = self.bias
        return linear


class Int8Linear(QuantizedLinear):
    """8 bits a weight, symmetric, a scale for each row: weight (out, in), weight_scale (out, 1)."""

    kind = "int8"

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight.float()
        scale = (weight.abs().amax(dim=1, keepdim=True) / 127).bfloat16()
        divisor = torch.where(scale == 0, 1, scale).float()
        return (weight / divisor).round().clamp(-127, 127).to(torch.int8), scale

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype).mul_(self.weight_scale.to(dtype))


class NF4Linear(QuantizedLinear):
    """4 bits a weight, normal floats of QLoRA (Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes.

    The codes of the weight, row after row, two in a byte: weight (out * in / 2, 1). A scale, the largest absolute
    value, for each 64 of them: weight_scale (out * in / 64), rounded up.
    """

    kind = "nf4"
    _BLOCK = 64

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        # of bfloat16 weights, whose largest is one: scales of other dtypes would have to be rounded
        codes, state = bitsandbytes().functional.quantize_4bit(
            weight.bfloat16(), blocksize=NF4Linear._BLOCK, quant_type="nf4"
        )
        return codes, state.absmax.bfloat16()

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes import functional

        size = self.out_features * self.in_features
        state = functional.QuantState(
            absmax=self.weight_scale.float(),
            # Its kernel for CPUs begins a block in each row, also where a block went on there.
            shape=torch.Size([size // self._BLOCK, self._BLOCK] if size % self._BLOCK == 0 else [1, size]),
            dtype=torch.float32 if dtype is torch.float64 else dtype,  # which it does not write
            blocksize=self._BLOCK,
            quant_type="nf4",
        )
        return functional.dequantize_4bit(self.weight, state).view(self.out_features, self.in_features).to(dtype)


_CLASSES: dict[Quantization, type[QuantizedLinear]] = {"int8": Int8Linear, "nf4": NF4Linear}


def bitsandbytes() -> Any:
    """The package, loaded at the first use. Raises a ValueError if it is not installed."""
    # On some processors it says that a faster kernel, which nobody calls here, is on the hub.
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            f"`quantization` is 'nf4', which needs bitsandbytes ({error}): pip install 'zolightning[quantization]', or "
            "use 'int8'."
        ) from None
    return bitsandbytes


def require_quantization(kind: str) -> None:
    """Raises a ValueError unless there is such a quantisation, and what it needs is installed."""
    if kind not in get_args(Quantization):
        raise ValueError(f"`quantization` must be None, {' or '.join(map(repr, _CLASSES))}, got {kind!r}.")
    if kind == "nf4":
        bitsandbytes()


def quantize(module: nn.Module, kind: Quantization) -> None:
    """Quantises the linear maps of a module in place: each ``nn.Linear`` but the output layer and tied ones.

    Embeddings, norms and biases stay as they are. "int8" takes 8 bits a weight, "nf4" 4.25.

    Raises:
        ValueError: if there is nothing to quantise, or bitsandbytes is not installed.
    """
    require_quantization(kind)
    owners = Counter(id(parameter) for child in module.modules() for parameter in child._parameters.values())
    output_layer = getattr(module, "get_output_embeddings", lambda: None)()
    chosen = {
        name: child
        for name, child in module.named_modules()
        # no subclasses, which may use their weight in other ways
        if type(child) is nn.Linear and child is not output_layer and owners[id(child.weight)] == 1
    }
    if not chosen:
        raise ValueError(
            f"`quantization` is {kind!r}, but {type(module).__name__} has no nn.Linear inside to quantise."
        )
    for name, linear in chosen.items():
        module.set_submodule(name, _CLASSES[kind](linear))


def quantized_linears(module: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The quantised linear maps of a module, with their dotted names."""
    for name, child in list(module.named_modules()):
        if isinstance(child, QuantizedLinear):
            yield name, child


def num_weights(module: nn.Module) -> int:
    """How many weights a module has, however they are stored; scales of quantised ones are not counted."""
    unpacked = sum(
        linear.in_features * linear.out_features - linear.weight.numel() - linear.weight_scale.numel()
        for _, linear in quantized_linears(module)
    )
    return sum(parameter.numel() for parameter in module.parameters()) + unpacked


def unquantize(module: nn.Module, names: Iterable[str]) -> set[str]:
    """Restores the quantised ones among the parameters that are to train; returns the names of the scales removed.

    Raises:
        MisconfigurationException: if the original weights have been forgotten, or nothing would stay quantised.
    """
    wanted, quantized = set(names), dict(quantized_linears(module))
    chosen = {name: linear for name, linear in quantized.items() if f"{name}.weight" in wanted}
    for name, linear in chosen.items():
        if linear.original is None:
            raise MisconfigurationException(
                f"`{name}.weight` is quantised ({linear.kind}) and so cannot train; its original is kept only until "
                "the first fit. Load the model again for a scope that trains other layers."
            )
    if chosen and len(chosen) == len(quantized):
        kind = next(iter(chosen.values())).kind
        raise MisconfigurationException(
            f"`model.quantization` is {kind!r}, but the scope trains all {len(chosen)} weights that it would quantise: "
            "none is left. Train fewer, or leave `quantization` out."
        )
    for name, linear in chosen.items():
        module.set_submodule(name, linear.plain())
    return {f"{name}.weight_scale" for name in chosen}


def forget_originals(module: nn.Module) -> None:
    """Frees the original weights: what is quantised now stays so."""
    for _, linear in quantized_linears(module):
        linear.keep(None)


def refuse_quantized(module: nn.Module, what: str) -> None:
    """Raises a ValueError if a module has quantised weights; `what` would have to write them."""
    for name, linear in quantized_linears(module):
        raise ValueError(
            f"`model.quantization` is {linear.kind!r}, but {what} moves all weights, also `{name}.weight`, which is "
            "quantised. Leave `quantization` out there."
        )


def refuse_training_all(module: nn.Module) -> None:
    """Raises a MisconfigurationException if weights of a module are quantised and all its other weights train."""
    settings = quantization_settings(module)
    if settings is None:
        return
    scales = {f"{name}.weight_scale" for name in settings["modules"]}
    others = (p for name, p in module.named_parameters() if p.is_floating_point() and name not in scales)
    if all(parameter.requires_grad for parameter in others):
        raise MisconfigurationException(
            f"`model.quantization` is {settings['kind']!r}, but nothing says which parameters train: "
            f"{len(settings['modules'])} quantised weights cannot, such as `{settings['modules'][0]}.weight`. Choose "
            "with a `scope` (TrainLayers, its `part` LoRA, or TrainParameters for their scales), or leave "
            "`quantization` out."
        )


def refuse_gradients(module: nn.Module) -> None:
    """Raises a MisconfigurationException if scales train for which there are no gradients: those of nf4."""
    if any(linear.kind == "nf4" and linear.weight_scale.requires_grad for _, linear in quantized_linears(module)):
        raise MisconfigurationException(
            "`model.quantization` is 'nf4', but scales of its weights train, for which bitsandbytes has no gradients. "
            "Train them by a zeroth-order `method`, or use 'int8'."
        )


def quantization_settings(module: nn.Module) -> QuantizationSettings | None:
    """What is quantised in a module; None if nothing is."""
    found = dict(quantized_linears(module))
    if not found:
        return None
    return QuantizationSettings(kind=next(iter(found.values())).kind, modules=sorted(found))


def restore_quantization(module: nn.Module, settings: QuantizationSettings | None) -> None:
    """Quantises or restores linear maps so that weights saved with these settings can be loaded.

    Raises:
        MisconfigurationException: if they were quantised in another way, or not at all.
    """
    present = quantization_settings(module)
    kind, saved_kind = present and present["kind"], settings and settings["kind"]
    if kind != saved_kind:
        raise MisconfigurationException(
            f"`model.quantization` is {kind!r}, but the checkpoint's run has {saved_kind!r}. Use the same one."
        )
    wanted = set(settings["modules"]) if settings else set()
    for name, linear in quantized_linears(module):
        if name not in wanted:
            module.set_submodule(name, linear.plain())
        wanted.discard(name)
    for name in wanted:
        module.set_submodule(name, _CLASSES[cast(Quantization, kind)](cast(nn.Linear, module.get_submodule(name))))


def dequantized_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` of an ordinary module that computes the same, its weights in the dtype of their scales."""
    state: dict[str, Tensor] = dict(module.state_dict())
    for name, linear in quantized_linears(module):
        state[f"{name}.weight"] = linear.dequantized(state.pop(f"{name}.weight_scale").dtype)
    return state
