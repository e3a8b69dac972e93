"""How fast noise is made: ours, added to a weight as a perturbation is, against ``torch.normal``."""

import statistics
from functools import partial
from typing import get_args

import torch
from torch import nn

from zolightning.bench.measure import CPU
from zolightning.commands.tables import Record
from zolightning.commands.timing import round_robin
from zolightning.directions.dense import directions
from zolightning.kernels.noise import NoiseKind

DTYPES = (torch.float32, torch.bfloat16)


def measure_noise(elements: int, repeats: int, device: torch.device = CPU) -> list[Record]:
    """Elements a second that ``torch.normal`` draws, and that ours reads, adds noise to and writes."""
    records: list[Record] = []
    for dtype in DTYPES:
        weight = nn.Parameter(torch.zeros(elements, dtype=dtype, device=device), requires_grad=False)
        out = torch.empty_like(weight)
        normal = partial(torch.normal, 0.0, 1.0, size=(elements,), dtype=dtype, device=device)
        work = {"torch.normal": normal} | {
            f"ours {kind}": partial(directions({"weight": weight}, 0, 0, {0: 1e-3}, kind)["weight"].add_to, weight, out)
            for kind in get_args(NoiseKind)
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
