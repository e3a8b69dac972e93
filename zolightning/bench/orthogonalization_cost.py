"""What the orthogonalizations of a step cost: those of ZO-Muon and of ZO-MOPI, for the cores of a model."""

import math
import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from zolightning.commands.tables import Record
from zolightning.commands.timing import round_robin
from zolightning.optim.orthogonalization import msign, newton_schulz, power_iteration


def measure_orthogonalization(model: nn.Module, rank: int, power_rank: int, repeats: int) -> list[Record]:
    """Median seconds for one core (rank, n) of every (m, n) matrix of `model`, those of one shape in one batch."""
    shapes = Counter(
        (min(rank, parameter.shape[0]), math.prod(parameter.shape[1:]))
        for parameter in model.parameters()
        if parameter.ndim > 1
    )
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    cores = [torch.randn(count, *shape, generator=generator, device=device) for shape, count in shapes.items()]
    rights = [torch.linalg.svd(core, full_matrices=False).Vh[:, :power_rank].mT.contiguous() for core in cores]
    work: dict[str, Callable[[], object]] = {
        "Newton-Schulz, five steps": partial(_each, newton_schulz, cores),
        "SVD": partial(_each, msign, cores),
        f"power iteration, rank {power_rank}": partial(_each, power_iteration, cores, rights),
    }
    medians = {name: statistics.median(seconds) for name, seconds in round_robin(work, repeats).items()}
    first = next(iter(medians.values()))
    return [{"row": name, "seconds": median, "over_newton_schulz": median / first} for name, median in medians.items()]


def _each(function: Callable[..., object], *batches: list[Tensor]) -> None:
    for arguments in zip(*batches, strict=True):
        function(*arguments)
