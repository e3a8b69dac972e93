"""How near the loops over parameters come to the bandwidth of a copy, and times of products with perturbed weights."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning import kernels
from zolightning.bench.floors import Ceilings
from zolightning.bench.loop_runs import noise
from zolightning.bench.measure import kernel_seconds
from zolightning.commands.tables import Record
from zolightning.directions.dense import Direction
from zolightning.evaluation.buffer import Buffer
from zolightning.evaluation.graph_capture import CudaCapture
from zolightning.evaluation.torch_functions import changed_pieces, multiply
from zolightning.kernels import torch_loops
from zolightning.kernels.adam import adam_step
from zolightning.kernels.noise import NOISE_KINDS, NoiseKind

ROWS_READ = 4096  # of a table of as many elements
PIECES_MIB = (64, 32, 16, 8)


def measure_kernels(device: torch.device, sizes: Sequence[int], ceilings: Ceilings) -> Iterator[Record]:
    """Times each kernel in bf16: milliseconds, gigabytes per second read and written, and the time over that of a copy.

    The most important come first: one query and the largest size; the loops of PyTorch come last.
    """
    for queries in (1, 2, 8):
        for kind in NOISE_KINDS:
            for size in sorted(sizes, reverse=True):
                yield from _measure(kernels, "", device, size, queries, kind, ceilings)
    yield from _measure(torch_loops, ", PyTorch", device, max(sizes), 1, "gaussian", ceilings)


def _measure(
    loops: ModuleType, name: str, device: torch.device, size: int, queries: int, kind: NoiseKind, ceilings: Ceilings
) -> Iterator[Record]:
    weight = torch.zeros(size, dtype=torch.bfloat16, device=device)
    plus, minus = torch.empty_like(weight), torch.empty_like(weight)
    low_word = torch.zeros_like(weight, dtype=torch.int16)
    drawn = noise(queries, kind, device, 1e-6)
    columns = max(2, size // (2 * ROWS_READ) * 2)
    table = weight[: size // columns * columns].view(-1, columns)
    rows = torch.arange(0, len(table), 2, device=device)
    read = torch.empty(len(rows), columns, dtype=torch.bfloat16, device=device)
    work: dict[str, tuple[int, Callable[[], object]]] = {
        "perturb": (4 * size, partial(loops.perturb, plus, weight, drawn)),
        "update exact": (8 * size, partial(loops.add, weight, drawn, extra_bits=low_word)),
        "perturb, both signs": (6 * size, partial(loops.perturb_both, plus, minus, weight, drawn)),
        "update native": (4 * size, partial(loops.add, weight, drawn)),
        "rows": (4 * read.numel(), partial(loops.perturb_rows, read, table, rows, drawn)),
    }
    if loops is kernels and queries == 1:
        moments = torch.zeros(2, size, device=device).unbind()
        step = adam_step((0.9, 0.999), 1, 1e-8, -1e-6)
        work["update exact, Adam"] = (
            24 * size,
            partial(loops.add_adam, weight, *moments, drawn, step=step, extra_bits=low_word),
        )
    for kernel, (moved, call) in work.items():
        seconds = kernel_seconds(call, device)
        yield {
            "name": f"{kernel}{name}, {size} elements, {kind}, {queries} queries",
            "milliseconds": 1e3 * seconds,
            "gb_per_second": moved / seconds / 1e9,
            "over_floor": seconds * ceilings.bytes_per_second / moved,
        }


@torch.no_grad()
def measure_pieces(device: torch.device, rows: int, columns: int, tokens: Sequence[int]) -> Iterator[Record]:
    """Times the product with a matrix that is perturbed and multiplied piece by piece, for some sizes of a piece.

    A piece that is small enough is still in the second-level cache when it is multiplied, and is overwritten there by
    the next one; its product may be too small for the whole card.

    Args:
        device: device to measure; on CUDA all work of a product is one graph.
        rows, columns: shape of the matrix.
        tokens: numbers of rows that it is multiplied with.
    """
    weight = nn.Parameter(torch.zeros(rows, columns, dtype=torch.bfloat16, device=device), requires_grad=False)
    drawn = noise(1, "gaussian", device, 1e-3)
    direction, buffer = Direction(drawn.keys, drawn.coefficients, drawn.kind), Buffer(device)
    for count in tokens:
        inputs = torch.randn(count, columns, device=device).to(weight.dtype)
        output = inputs.new_empty(count, rows)
        product = partial(_product_in_pieces, inputs, weight, direction, buffer, output)
        work: dict[str, Callable[[], object]] = {"not perturbed": partial(F.linear, inputs, weight)}
        work |= {"whole": partial(product, weight.nbytes)}
        work |= {f"pieces of {mib} MiB": partial(product, mib * 2**20) for mib in PIECES_MIB}
        for name, call in work.items():
            seconds = kernel_seconds(_as_one_graph(call, device), device)
            yield {"name": f"{rows} x {columns}, {count} tokens, {name}", "milliseconds": 1e3 * seconds}


def _product_in_pieces(
    inputs: Tensor, weight: nn.Parameter, direction: Direction, buffer: Buffer, output: Tensor, limit: int
) -> None:
    for part, piece in changed_pieces(weight, direction, buffer, limit):
        multiply(inputs, piece.T, None, output[:, part])


def _as_one_graph(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """On CUDA a function that replays all that `call` launches, so that its time does not include the host's."""
    if device.type != "cuda":
        return call
    call()  # compiles what it needs, and allocates its memory
    capture = CudaCapture(device)
    capture.warm_up(call)
    return capture.record(call)[1]
