"""Parts of a step by themselves: noise against ``torch.normal``, and the orthogonalizations of ZO-Muon and ZO-MOPI."""

import math
import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from zolightning.commands.tables import Record
from zolightning.commands.timing import round_robin
from zolightning.directions.dense import directions
from zolightning.kernels.noise import NOISE_KINDS
from zolightning.optim.orthogonalization import msign, newton_schulz, power_iteration


def measure_noise(elements: int, repeats: int, device: torch.device) -> list[Record]:
    """Elements a second that ``torch.normal`` draws, and that ours reads, adds noise to and writes."""
    records: list[Record] = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.zeros(elements, dtype=dtype, device=device), requires_grad=False)
        out = torch.empty_like(weight)
        normal = partial(torch.normal, 0.0, 1.0, size=(elements,), dtype=dtype, device=device)
        work = {"torch.normal": normal} | {
            f"ours {kind}": partial(directions({"weight": weight}, 0, 0, {0: 1e-3}, kind)["weight"].add_to, weight, out)
            for kind in NOISE_KINDS
        }
        medians = {name: statistics.median(seconds) for name, seconds in round_robin(work, repeats).items()}
        records += [
            {
                "row": f"{name} {str(dtype).removeprefix('torch.')}",
                "elements_per_second": elements / median,
                "row_over_torch_normal": medians["torch.normal"] / median,
            }
            for name, median in medians.items()
        ]
    return records


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
