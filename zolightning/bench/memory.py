"""GB that training takes on a GPU, by model and mode, as a table in Markdown: ``python -m zolightning.bench memory``.

Computed from shapes (:mod:`zolightning.memory`) on any machine; nothing is downloaded, and no weight is allocated.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from zolightning.bench.options import option
from zolightning.bench.shapes import SHAPES, model_of_shape
from zolightning.layers import find_layers
from zolightning.memory import BatchShape, MemoryPlan, Trained, plan, trained_whole
from zolightning.memory_alternatives import layer, on_quantized, with_lora, with_scales
from zolightning.optim import LOZO, ZOMOPI, HiZOO, MeZO, SubZero

# Bytes to plan with, by the nominal GiB of a card: 2 % are left for what an estimate misses.
CARDS = {gigabytes: gigabytes * 2**30 * 98 // 100 for gigabytes in (24, 48, 80)}
CONTEXT = 800 * 10**6  # bytes for CUDA's context, workspaces of its libraries, and space lost between blocks


@dataclass(frozen=True)
class Settings:
    """The options of the benchmark."""

    models: list[str] = option(
        f"of {', '.join(SHAPES)}",
        ["opt-1.3b", "llama-2-7b", "llama-3-8b", "qwen3-8b", "opt-13b", "qwen3-14b"],
        choices=SHAPES,
        metavar="MODEL",
    )
    rows: list[int] = option("sequences of a forward pass", [16])
    length: int = option("tokens of each", 256)
    positions: int = option("of them with logits that are read", 1)


Mode = Callable[[nn.Module, BatchShape], MemoryPlan]


def _all(model: nn.Module) -> list[Trained]:
    return trained_whole(model.parameters())


def _layers(model: nn.Module) -> list[Trained]:
    """Without the token embeddings and the output layer."""
    return trained_whole(parameter for layer in find_layers(model).layers for parameter in layer.parameters())


def _focus(model: nn.Module) -> list[Trained]:
    """What FOCUS moves at once: a layer, and all that is not in layers."""
    stack = find_layers(model)
    in_layers = {parameter for index in range(len(stack)) for parameter in stack.parameters(index).values()}
    return layer(model) + trained_whole((p for p in model.parameters() if p not in in_layers), beside=True)


_LOZO, _SUBZERO, _MOPI = partial(LOZO, rank=4), partial(SubZero, rank=64), partial(ZOMOPI, rank=64, power_rank=32)
MODES: dict[str, Mode] = {
    "inference": lambda m, batch: plan(m, [], MeZO, batch),
    "MeZO, `update_precision: native`": lambda m, batch: plan(m, _all(m), MeZO, batch, update_precision="native"),
    "MeZO, `update_precision: low_byte`": lambda m, batch: plan(m, _all(m), MeZO, batch, update_precision="low_byte"),
    "MeZO, `low_byte`, embeddings frozen": lambda m, batch: plan(
        m, _layers(m), MeZO, batch, update_precision="low_byte"
    ),
    "MeZO, `update_precision: exact`": lambda m, batch: plan(m, _all(m), MeZO, batch),
    "LOZO, rank 4, exact": lambda m, batch: plan(m, _all(m), _LOZO, batch),
    "LOZO, exact, `offload_low_words`": lambda m, batch: plan(m, _all(m), _LOZO, batch, offload_low_words=True),
    "SubZero, rank 64, exact": lambda m, batch: plan(m, _all(m), _SUBZERO, batch),
    "ZO-MOPI, rank 64, k 32, exact": lambda m, batch: plan(m, _all(m), _MOPI, batch),
    "ZO-MOPI, exact, `offload_low_words`": lambda m, batch: plan(m, _all(m), _MOPI, batch, offload_low_words=True),
    "HiZOO, exact": lambda m, batch: plan(m, _all(m), HiZOO, batch),
    "HiZOO-L, exact": lambda m, batch: plan(m, _all(m), partial(HiZOO, curvature="row_column"), batch),
    "FOCUS, exact": lambda m, batch: plan(m, _focus(m), HiZOO, batch),
    "FOCUS, `update_precision: native`": lambda m, batch: plan(m, _focus(m), HiZOO, batch, update_precision="native"),
    "FOCUS, layers alone, exact": lambda m, batch: plan(m, layer(m), HiZOO, batch),
    "one layer, MeZO, exact": lambda m, batch: plan(m, layer(m), MeZO, batch),
    "one layer, `quantization: int8`": lambda m, batch: on_quantized(
        plan(m, layer(m), MeZO, batch), m, "int8", layer(m)
    ),
    "LoRA, MeZO": lambda m, batch: with_lora(m, MeZO, batch),
    "LoRA, `quantization: int8`": lambda m, batch: on_quantized(with_lora(m, MeZO, batch), m, "int8"),
    "LoRA, `quantization: nf4`": lambda m, batch: on_quantized(with_lora(m, MeZO, batch), m, "nf4"),
    "scales (QZO), `quantization: int8`": lambda m, batch: with_scales(m, "int8", MeZO, batch),
    "scales (QZO), `quantization: nf4`": lambda m, batch: with_scales(m, "nf4", MeZO, batch),
}


def table(models: Iterable[str], batches: Sequence[BatchShape]) -> Iterator[str]:
    """Lines of Markdown: a row a mode, a column a model and batch.

    A cell is the peak in GB (1e9 bytes), CUDA's own share included, then the smallest card that has as much, or a dash,
    and with a plus the host memory that is used besides.
    """
    columns = {
        name if len(batches) == 1 else f"{name}, {batch.rows} rows": (network, batch)
        for name in models
        for network in [model_of_shape(name, device="meta")]
        for batch in batches
    }
    yield f"| GB (smallest card) | {' | '.join(columns)} |"
    yield f"|---|{'---|' * len(columns)}"
    for name, mode in MODES.items():
        yield f"| {name} | {' | '.join(cell(mode(*column)) for column in columns.values())} |"


def cell(planned: MemoryPlan) -> str:
    """``33.7 (48)``: the GB that a plan takes, and the smallest card that holds it."""
    needed = planned.peak + CONTEXT
    card = next((str(gigabytes) for gigabytes, usable in CARDS.items() if needed <= usable), "-")
    beside = f" + {planned.host / 1e9:.1f}" if planned.host else ""
    return f"{needed / 1e9:.1f} ({card}){beside}"


def run(settings: Settings) -> None:
    """Prints the table."""
    for line in table(
        settings.models, [BatchShape(rows, settings.length, settings.positions) for rows in settings.rows]
    ):
        print(line, flush=True)
