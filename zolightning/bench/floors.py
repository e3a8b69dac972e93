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
from zolightning.commands.tables import Record
from zolightning.optim.dense import DenseOptimizer
from zolightning.optim.estimators import TwoSided
from zolightning.optim.precision import state_bytes
from zolightning.optim.subspace_weights import SubspaceWeights


@dataclass(frozen=True)
class Ceilings:
    """The best that the machine can do, measured in the same run."""

    bytes_per_second: float  # rate of a copy, counting the bytes read and those written
    flops_per_second: float  # rate of a product of square matrices in the dtype of the weights

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> "Ceilings":
        """Times a copy, and a product of matrices in this dtype."""
        is_cuda = device.type == "cuda"
        copy_bytes, width, repeats = (2 * 10**9, 8192, 20) if is_cuda else (64 * 10**6, 1024, 5)
        source = torch.zeros(copy_bytes // 2, dtype=torch.int16, device=device)
        target = torch.empty_like(source)
        copying = kernel_seconds(partial(target.copy_, source), device, repeats)
        del source, target
        # Random, because a card draws less power and clocks higher on zeros.
        left, right = torch.randn(2, width, width, device=device).to(dtype)
        out = torch.empty_like(left)
        multiplying = kernel_seconds(partial(torch.mm, left, right, out=out), device, repeats)
        return cls(2 * copy_bytes / copying, 2 * width**3 / multiplying)


@torch.no_grad()
def forward_flops(loss: Callable[[], Tensor]) -> int:
    """Floating point operations of the matrix products in one evaluation, including attention.

    Attention runs unfused here: the counter refuses fused kernels whose keys have fewer heads than the queries.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss()
    return counter.get_total_flops()


def perturbed_bytes(model: nn.Module, parameters: list[nn.Parameter]) -> int:
    """Bytes of the weights that an evaluation perturbs whole; of an embedding table it perturbs only the rows read."""
    modules = list(model.modules())
    tables = {module.weight for module in modules if isinstance(module, nn.Embedding)}
    tables -= {module.weight for module in modules if isinstance(module, nn.Linear)}
    return sum(parameter.nbytes for parameter in parameters if parameter not in tables)


def parameter_side_bytes(model: nn.Module, step: Step, forwards: int) -> int | None:
    """The least number of bytes that a step of one of our methods moves besides its forwards; None for other steps.

    For each evaluation, a dense method reads every weight and writes the perturbed weight to a scratch tensor; both
    signs need one read where they share a forward. The update reads and writes each weight and the bits that complete
    it to fp32. Methods with low-rank directions have the update only, those in a subspace nothing between two
    resamplings.
    """
    if not isinstance(step, OptimizerStep):
        return None
    optimizer = step.optimizer
    if isinstance(optimizer, SubspaceWeights):
        return 0
    trained = [parameter for _, _, parameter in optimizer.trainable()]
    update = sum(p.nbytes + p.numel() * state_bytes(p.dtype, optimizer.update_precision) for p in trained)
    if not isinstance(optimizer, DenseOptimizer):
        return 2 * update
    shares_reads = step.evaluations_per_forward > 1 and isinstance(optimizer.estimator, TwoSided)
    reads = forwards // 2 if shares_reads else forwards
    return (reads + forwards) * perturbed_bytes(model, trained) + 2 * update


def floor_table(model: nn.Module, flops: float, ceilings: Ceilings) -> list[Record]:
    """The least milliseconds that each part of a two-sided dense step takes, if it trains all of `model`."""
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
    parts |= {name: size / ceilings.bytes_per_second for name, size in moved.items()}
    return [{"row": name, "milliseconds": 1e3 * seconds} for name, seconds in parts.items()]
