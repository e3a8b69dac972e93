"""The command ``python -m zolightning.bench step``: what a training step takes, ours and as published.

All rows take a quarter of an hour on two cores.
"""

import torch

from zolightning.bench.figures import write_csv
from zolightning.bench.floors import Ceilings
from zolightning.bench.measure import machine, require
from zolightning.bench.rows import RANK
from zolightning.bench.shapes import PREFIX
from zolightning.bench.step_cost import Settings, measure_step
from zolightning.bench.step_parts import measure_noise
from zolightning.bench.subject import DTYPES
from zolightning.commands.tables import Record, print_table


def run(settings: Settings) -> None:
    """Measures, prints the tables and writes them to one file."""
    device = torch.device(settings.device)
    require(device)
    ceilings = Ceilings.measure(device, getattr(torch, DTYPES[settings.precision]))
    context = machine(device) | {
        "copy_gb_per_second": f"{ceilings.bytes_per_second / 1e9:.0f}",
        "product_tflop_per_second": f"{ceilings.flops_per_second / 1e12:.3g}",
        **{name: getattr(settings, name) for name in ("model", "precision", "batch_size", "seq_len")},
    }
    print(", ".join(f"{name} {value}" for name, value in context.items() if value is not None))
    tables: dict[str, list[Record]] = {}
    for name, records in measure_step(settings, ceilings):
        tables[name] = records
        write_csv(settings.output, tables, context)  # what there is, should the rest not come
    tables["noise"] = measure_noise(settings.noise_elements, settings.repeats, device)
    titles = {
        "random tokens": f"{settings.batch_size} x {settings.seq_len} random tokens, all logits",
        "prompts": f"batches of {settings.batch_size} prompts from {_source(settings)}",
        "noise": f"noise for {settings.noise_elements:,} elements",
        "orthogonalization": f"orthogonalization of a core of rank {RANK} for each matrix",
    }
    for name, records in tables.items():
        print_table(titles.get(name, name), records)
    write_csv(settings.output, tables, context)
    print(f"\nwritten to {settings.output}")


def _source(settings: Settings) -> str:
    if settings.model.startswith(PREFIX):
        return f"drawn lengths ({settings.lengths})"
    return str(settings.data_path or "the packaged sentiment set")
