"""Memory plans of other ways to train the same network: other precisions, methods, scopes, quantised weights."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from zolightning.layers import find_layers, is_conv1d
from zolightning.memory import BatchShape, MemoryPlan, Trained, first_mlp, plan, trained_whole, unpacked_bytes
from zolightning.network.quantization import Quantization
from zolightning.optim.base import Method
from zolightning.optim.lozo import LOZO
from zolightning.optim.precision import UPDATE_PRECISIONS
from zolightning.optim.subspace_weights import SubspaceWeights

LORA_RANK = 8


def alternatives(
    module: nn.Module,
    trained: Iterable[Trained],
    method: Method,
    batch: BatchShape | None = None,
    cuda_graphs: bool = False,
) -> dict[str, MemoryPlan]:
    """Memory plans of other ways to train the network, without CUDA graphs, by the settings that choose them."""
    trained, trial = list(trained), method([nn.Parameter(torch.zeros(1, 1))])
    found = {"evaluation.cuda_graphs false": plan(module, trained, method, batch)} if cuda_graphs else {}
    found |= {
        f"method.update_precision {precision}": plan(module, trained, method, batch, update_precision=precision)
        for precision in UPDATE_PRECISIONS
        if precision != trial.update_precision
    }
    if isinstance(trial, SubspaceWeights):
        found["method.offload_low_words true"] = plan(module, trained, method, batch, offload_low_words=True)
    else:
        found["method LOZO, offload_low_words true"] = plan(module, trained, LOZO, batch, offload_low_words=True)
    if first_mlp(module) is not None and not unpacked_bytes(module):
        one_layer = plan(module, layer(module), method, batch)
        found["one layer (scope DominantLayer)"] = one_layer
        found["one layer, model.quantization int8"] = on_quantized(one_layer, module, "int8", layer(module))
        found["adapters (configs/scopes/lora.yaml)"] = adapters = with_lora(module, method, batch)
        found["adapters, model.quantization nf4"] = on_quantized(adapters, module, "nf4")
        found["scales (configs/quantization/qzo.yaml)"] = with_scales(module, "int8", method, batch)
    return found


def layer(module: nn.Module) -> list[Trained]:
    """The parameters of the first of a module's layers."""
    return trained_whole(find_layers(module).parameters(0).values())


def with_lora(module: nn.Module, method: Method, batch: BatchShape | None) -> MemoryPlan:
    """The plan for training LoRA adapters of rank 8 on all linear maps of the layers."""
    adapters = [
        torch.empty(shape, dtype=weight.dtype, device="meta")
        for weight in _linears(module)
        for shape in ((LORA_RANK, weight.shape[1]), (weight.shape[0], LORA_RANK))
    ]
    found = plan(module, trained_whole(adapters), method, batch)
    return replace(found, weights=found.weights + sum(adapter.nbytes for adapter in adapters))


def with_scales(module: nn.Module, quantization: Quantization, method: Method, batch: BatchShape | None) -> MemoryPlan:
    """The plan for quantising the linear maps of the layers and training their scales, nothing else (QZO)."""
    scales = [
        torch.empty(_scale_shape(weight, quantization), dtype=weight.dtype, device="meta")
        for weight in _linears(module)
    ]
    return on_quantized(plan(module, trained_whole(scales), method, batch), module, quantization)


def on_quantized(
    planned: MemoryPlan, module: nn.Module, quantization: Quantization, trained: Iterable[Trained] = ()
) -> MemoryPlan:
    """A plan with the linear maps of the layers quantised, except those in `trained`."""
    own = {id(one.weight) for one in trained}
    base = [weight for weight in _linears(module) if id(weight) not in own]
    saved = sum(weight.nbytes - _quantized_bytes(weight, quantization) for weight in base)
    unpacked = max(weight.nbytes for weight in base)
    return replace(planned, weights=planned.weights - saved, scratch=max(planned.scratch, unpacked))


def _quantized_bytes(weight: Tensor, quantization: Quantization) -> int:
    """Codes and 16-bit scales."""
    codes = weight.numel() if quantization == "int8" else math.ceil(weight.numel() / 2)
    return codes + 2 * math.prod(_scale_shape(weight, quantization))


def _scale_shape(weight: Tensor, quantization: Quantization) -> tuple[int, ...]:
    """A scale a row, or one for each 64 codes."""
    return (weight.shape[0], 1) if quantization == "int8" else (math.ceil(weight.numel() / 64),)


def _linears(module: nn.Module) -> Iterator[Tensor]:
    """Weights of the linear maps in the layers."""
    for one in find_layers(module).layers:
        for submodule in one.modules():
            if isinstance(submodule, nn.Linear) or is_conv1d(submodule):
                yield submodule.weight
