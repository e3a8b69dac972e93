"""The least that a step can take: its products at the card's rate, its passes over weights at that of its memory."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zolightning.bench.measure import kernel_seconds
from zolightning.bench.rows import OptimizerStep, Step
from zolightning.commands.report import Record
from zolightning.optim.dense import DenseOptimizer
from zolightning.optim.precision import state_bytes


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best, measured in the same run.

    Attributes:
        bytes_per_second: read and written by a copy.
        flops_per_second: of a square product in the dtype of the weights.
    """

    bytes_per_second: float
    flops_per_second: float

    @classmethod
    def measure(
        cls, device: torch.device, dtype: torch.dtype, copy_bytes: int | None = None, width: int | None = None
    ) -> "Ceilings":
        """Copies and multiplies.

        Args:
            device: where.
            dtype: of the product.
            copy_bytes: read, and written; 2 GB on CUDA and 64 MB elsewhere if not given.
            width: of the square matrices; 8,192 on CUDA and 1,024 elsewhere if not given.
        """
        is_cuda = device.type == "cuda"
        copy_bytes = copy_bytes or (2 * 10**9 if is_cuda else 64 * 10**6)
        width = width or (8192 if is_cuda else 1024)
        source = torch.zeros(copy_bytes // 2, dtype=torch.int16, device=device)
        target = torch.empty_like(source)
        repeats = 20 if is_cuda else 5
        copying = kernel_seconds(partial(target.copy_, source), device, repeats)
        del source, target
        # Random, for a card draws less power and clocks higher on zeros.
        left, right = torch.randn(2, width, width, device=device).to(dtype)
        out = torch.empty_like(left)
        multiplying = kernel_seconds(partial(torch.mm, left, right, out=out), device, repeats)
        return cls(2 * copy_bytes / copying, 2 * width**3 / multiplying)


@torch.no_grad()
def forward_flops(loss: Callable[[], Tensor]) -> int:
    """Floating point operations of the products of one evaluation, attention among them.

    Attention runs as plain products meanwhile: the counter refuses fused kernels whose keys have fewer heads.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss()
    return counter.get_total_flops()


def perturbed_bytes(model: nn.Module, parameters: list[nn.Parameter]) -> int:
    """Bytes of the weights that an evaluation perturbs as a whole: of a table of embeddings only rows are read."""
    modules = list(model.modules())
    tables = {module.weight for module in modules if isinstance(module, nn.Embedding)}
    tables -= {module.weight for module in modules if isinstance(module, nn.Linear)}
    return sum(parameter.nbytes for parameter in parameters if parameter not in tables)


def parameter_side_bytes(model: nn.Module, step: Step, forwards: int) -> int | None:
    """The least bytes that a step moves beside its forwards, as our methods take it.

    A dense method writes every weight to scratch at each evaluation, which it reads for that, once for both signs where
    they share a forward; at the update it reads and writes the weight and what completes it to fp32. Steps of low-rank
    methods touch no weight between two resamplings. None for steps that are not ours.
    """
    if not isinstance(step, OptimizerStep):
        return None
    optimizer = step.optimizer
    if not isinstance(optimizer, DenseOptimizer):
        return 0
    trained = [parameter for _, _, parameter in optimizer.trainable()]
    update = sum(p.nbytes + p.numel() * state_bytes(p.dtype, optimizer.update_precision) for p in trained)
    reads = forwards if step.evaluations_per_forward == 1 else forwards // 2
    return (reads + forwards) * perturbed_bytes(model, trained) + 2 * update


def floor_table(model: nn.Module, flops: float, ceilings: Ceilings) -> list[Record]:
    """Milliseconds of the parts of a two-sided dense step that trains all of `model`.

    Args:
        model: whose weights are perturbed and updated.
        flops: of one forward.
        ceilings: of the machine.
    """
    parameters = list(model.parameters())
    scratch, weights = perturbed_bytes(model, parameters), sum(parameter.nbytes for parameter in parameters)
    low_words = sum(p.numel() * state_bytes(p.dtype, "exact") for p in parameters)
    moved = {
        "scratch, one pass a sign": 4 * scratch,  # read and written twice
        "scratch, both signs from one pass": 3 * scratch,
        "update native": 2 * weights,
        "update exact": 2 * (weights + low_words),
    }
    parts = {"two forwards": 2 * flops / ceilings.flops_per_second}
    parts |= {name: bytes / ceilings.bytes_per_second for name, bytes in moved.items()}
    return [{"row": name, "milliseconds": 1e3 * seconds} for name, seconds in parts.items()]
