"""When steps in one layer at a time are faster than steps of all weights: ``python -m zolightning.bench blocks``.

A step is forwards and passes over the parameters it moves. If the passes of MeZO over all weights take x times as long
as one bare forward, and L layers move one at a time and nothing else does, a step takes, in units of that forward:

* MeZO: ``2 + x``
* FOCUS: ``3 + x / L``; and where what lies below the layer is computed once, ``2 + x / L`` on average, since two of the
  three forwards run from the layer upwards and layers are half way up on average.

So FOCUS is faster by any factor only where x is large: short prompts, small batches, slow passes. The factor published
for OPT-30B at batches of 32 (1.83, three full forwards, 48 layers) takes an x of 3.6: passes that take two thirds of
MeZO's step; where what lies below the layer is computed once, an x of 1.7. With embeddings and head moving in each
step, their share of the weights is moved beside the layer.

Measured: seconds on prompts of SST-2 at several batch sizes, where x is what MeZO takes beyond two forwards; and the
factors, next to those that the model predicts.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from zolightning.bench.figures import write_csv
from zolightning.bench.measure import machine
from zolightning.bench.options import CLOCKS, Clock, Device, Precision, option
from zolightning.bench.prompts import Prompts, time_prompts
from zolightning.bench.rows import BY_NAME, FORWARD
from zolightning.bench.subject import Subject
from zolightning.commands.tables import Record, print_table
from zolightning.layers import find_layers

ROWS = ("MeZO", "HiZOO", "Sparse-MeZO", "MeZO-BCD, layers", "FOCUS, cyclic", "FOCUS, embeddings and head beside")


@dataclass(frozen=True)
class Settings:
    """The options of the benchmark."""

    model: str = option("as of `step`")
    precision: Precision = option("of the weights", "bf16-true")
    device: Device = option("where to run", "cpu")
    batch_sizes: list[int] = option("rows a batch", [1, 4, 16, 32])
    data_path: Path | None = option("folder of SST-2 as JSON lines, not the package's sentiment set", None)
    prompt_batches: int = option("batches of prompts", 2)
    repeats: int = option("rounds that a median is taken over", 3)
    clock: Clock = option("cpu: time of this process, on shared machines", "wall")
    output: Path = option("file to write", Path("logs/bench/blocks.csv"))


def speedup(passes: float, layers: int, beside: float = 0.0) -> float:
    """How many times as fast as a step of MeZO one of FOCUS is, which computes once what lies below all that moves.

    Args:
        passes: time of the passes over all weights in a step of MeZO, in units of one forward.
        layers: number of layers, one of which moves.
        beside: share of the weights that moves in every step beside the layer, embeddings among them.
    """
    forwards = 3.0 if beside else 2.0
    return (2 + passes) / (forwards + passes * (beside + (1 - beside) / layers))


def measure(subject: Subject, batch_size: int, settings: Settings) -> Record:
    """Seconds of the rows on prompts, in turns, and the factors measured next to those of the model in this file."""
    model, rows = subject.model, [FORWARD, *(BY_NAME[name] for name in ROWS)]
    device = next(model.parameters()).device
    examples = subject.examples(settings.data_path, "sst2", settings.prompt_batches, batch_size)
    prompts = Prompts.of(examples, batch_size, subject.pad_id, device)
    work = [(row.make(model), prompts.losses(row, model)) for row in rows]
    found = time_prompts(work, settings.repeats, CLOCKS[settings.clock])
    seconds = {row.name: taken / row.steps for row, taken in zip(rows, found, strict=True)}
    forward, mezo = seconds[FORWARD.name], seconds["MeZO"]
    stack = find_layers(model)
    in_layers = sum(p.numel() for index in range(len(stack)) for p in stack.parameters(index).values())
    beside = 1 - in_layers / sum(p.numel() for p in model.parameters())
    passes = mezo / forward - 2
    return {
        "batch": str(batch_size),
        **{f"seconds, {name}": taken for name, taken in seconds.items()},
        "MeZO's passes in forwards": passes,
        "MeZO over FOCUS, layers": mezo / seconds["FOCUS, cyclic"],
        "by the model": speedup(passes, len(stack)),
        "MeZO over FOCUS, beside": mezo / seconds["FOCUS, embeddings and head beside"],
        "by the model, beside": speedup(passes, len(stack), beside),
        "HiZOO over FOCUS, layers": seconds["HiZOO"] / seconds["FOCUS, cyclic"],
        "HiZOO over its forwards": seconds["HiZOO"] / (3 * forward),
        "FOCUS over its forwards": seconds["FOCUS, cyclic"] / (3 * forward),
    }


def run(settings: Settings) -> None:
    """Measures, prints a table and writes it to a file."""
    device = torch.device(settings.device)
    subject = Subject.load(settings.model, settings.precision, device)
    records = [measure(subject, size, settings) for size in settings.batch_sizes]
    # Sizes are the columns here: there are few of them, and many figures.
    figures = [name for name in records[0] if name != "batch"]
    print_table(
        "batches of prompts",
        [{"": name, **{str(record["batch"]): record[name] for record in records}} for name in figures],
    )
    write_csv(settings.output, {"blocks": records}, machine(device) | {"model": settings.model})
    print(f"\nwritten to {settings.output}")
