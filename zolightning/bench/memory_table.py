"""GB that training takes of a GPU, by model and mode, as a table in Markdown: ``python -m zolightning.bench memory``.

Computed from shapes (:mod:`zolightning.memory`) on any machine; nothing is downloaded, and no weight is allocated.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from torch import nn

from zolightning.bench.shapes import SHAPES, model_of_shape
from zolightning.layers import find_layers
from zolightning.memory import BatchShape, MemoryPlan, Method, Trained, layer, plan, whole, with_lora
from zolightning.optim import LOZO, ZOMOPI, MeZO, SubZero
from zolightning.quantization import Quantization

MODELS = ("opt-1.3b", "llama-2-7b", "llama-3-8b", "qwen3-8b", "opt-13b", "qwen3-14b")
CARDS = {24: 24 * 2**30, 48: 48 * 2**30, 80: 79 * 2**30}  # the least that cards of these names have, in bytes
CONTEXT = 800 * 10**6  # bytes for CUDA's context, workspaces of its libraries, and space lost between blocks

Mode = Callable[[nn.Module, BatchShape], MemoryPlan]


def _training(
    method: Method, chosen: Callable[[nn.Module], list[Trained]], model: nn.Module, batch: BatchShape
) -> MemoryPlan:
    return plan(model, chosen(model), method, batch)


def _all(model: nn.Module) -> list[Trained]:
    return whole(model.parameters())


def _in_layers(model: nn.Module) -> list[Trained]:
    """Without the token embeddings and the output layer."""
    return whole(parameter for layer in find_layers(model).layers for parameter in layer.parameters())


def _lora(quantization: Quantization | None, model: nn.Module, batch: BatchShape) -> MemoryPlan:
    return with_lora(model, MeZO, batch, quantization)


_MOPI = partial(ZOMOPI, rank=64, power_rank=32)
MODES: dict[str, Mode] = {
    "inference": partial(_training, MeZO, lambda model: []),
    **{
        f"MeZO, `update_precision: {name}`": partial(_training, partial(MeZO, update_precision=name), _all)
        for name in ("native", "exact", "low_byte")
    },
    "the same in all layers, not the embeddings": partial(
        _training, partial(MeZO, update_precision="low_byte"), _in_layers
    ),
    "MeZO in one layer": partial(_training, MeZO, layer),
    "LOZO, rank 4": partial(_training, partial(LOZO, rank=4), _all),
    "SubZero, rank 64": partial(_training, partial(SubZero, rank=64), _all),
    "ZO-MOPI, rank 64, power rank 32": partial(_training, _MOPI, _all),
    "LOZO, `offload_low_words`": partial(_training, partial(LOZO, rank=4, offload_low_words=True), _all),
    "ZO-MOPI, `offload_low_words`": partial(_training, partial(_MOPI, offload_low_words=True), _all),
    "MeZO on LoRA adapters": partial(_lora, None),
    "the same, `quantization: int8`": partial(_lora, "int8"),
    "the same, `quantization: nf4`": partial(_lora, "nf4"),
}


def table(models: Iterable[str], batch: BatchShape) -> Iterator[str]:
    """Lines of Markdown: a row a mode, a column a model.

    A cell is the peak in GB (1e9 bytes), CUDA's own share included, then the smallest card that has as much, or a dash,
    and with a plus the host memory that is used beside.
    """
    networks = {name: model_of_shape(name, device="meta") for name in models}
    yield f"| GB (smallest card) | {' | '.join(networks)} |"
    yield f"|---|{'---|' * len(networks)}"
    for name, mode in MODES.items():
        yield f"| {name} | {' | '.join(cell(mode(network, batch)) for network in networks.values())} |"


def cell(planned: MemoryPlan) -> str:
    """``33.7 (48)``: what a plan takes, and on which card."""
    needed = planned.peak + CONTEXT
    card = next((str(gigabytes) for gigabytes, usable in CARDS.items() if needed <= usable), "-")
    beside = f" + {planned.host / 1e9:.1f}" if planned.host else ""
    return f"{needed / 1e9:.1f} ({card}){beside}"


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds ``memory`` to the benchmarks."""
    parser = commands.add_parser(
        "memory",
        description=__doc__,
        help="GB by model and mode",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=MODELS, metavar="MODEL", help=", ".join(SHAPES))
    parser.add_argument("--rows", type=int, default=16, help="sequences of a forward pass")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--positions", type=int, default=1, help="of them with logits that are read")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    for line in table(arguments.models, BatchShape(arguments.rows, arguments.length, arguments.positions)):
        print(line, flush=True)
