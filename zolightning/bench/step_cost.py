"""Seconds and memory of a training step, ours and as published: ``python -m zolightning.bench step``.

Times come from one process, in which the rows take turns; peaks of memory from a fresh process for each row.
"""

import argparse
import re
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from zolightning.bench.measure import peak_bytes, reset_peak, resident_bytes
from zolightning.bench.noise_cost import measure_noise
from zolightning.bench.orthogonalization_cost import measure_orthogonalization
from zolightning.bench.prompts import measure_prompts
from zolightning.bench.report import machine, write_csv
from zolightning.bench.rows import DENSE, FORWARD, POWER_RANK, PUBLISHED, RANK, ROWS, SUBSPACE, Row, state_bytes
from zolightning.commands.report import Record, print_table, round_robin
from zolightning.models import CausalLM

DTYPES: dict[str, Literal["float32", "bfloat16", "float16"]] = {
    "32-true": "float32",
    "bf16-true": "bfloat16",
    "16-true": "float16",
}
MEMORY_STEPS = 3
MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """The arguments of the command.

    Attributes:
        model: what ``model.model_name`` accepts: a hub id, a folder, a GGUF file or ``pypi://``.
        precision: of the weights, and so of everything.
        batch_size: rows of random tokens, and examples of real prompts, a batch.
        seq_len: random tokens a row.
        data_path: folder of SST-2 as JSON lines; the package's sentiment set if not given.
        prompt_batches: batches of real prompts that a mean is taken over.
        noise_elements: elements of the tensor that noise is made for.
        rows: regular expressions; only rows whose names match one of them are measured, and those they are compared
            with. All rows where there is none.
        repeats: timed rounds, and passes over the prompts, that a median is taken over.
        threads: of torch; all that it takes by itself if not given.
        output: the file to write.
    """

    model: str
    precision: str = "bf16-true"
    batch_size: int = 16
    seq_len: int = 32
    data_path: Path | None = None
    prompt_batches: int = 8
    noise_elements: int = 10_000_000
    rows: tuple[str, ...] = ()
    repeats: int = 7
    threads: int | None = None
    output: Path = Path("logs/bench/step.csv")

    def chosen(self, rows: list[Row]) -> list[Row]:
        """Those of some rows that are to be measured."""
        return [row for row in rows if row in (FORWARD, PUBLISHED) or not self.rows or self._matches(row)]

    def _matches(self, row: Row) -> bool:
        return any(re.search(pattern, row.name) for pattern in self.rows)


@dataclass(frozen=True)
class Memory:
    """Bytes of a process that does nothing but a few steps.

    Attributes:
        loading: peak until the model was loaded.
        loaded: held before the first step; None where the system does not say.
        peak: of the steps, or of everything where the system cannot tell them apart.
        state: kept by the step beside the weights.
    """

    loading: int
    loaded: int | None
    peak: int
    state: int


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds ``step`` to the benchmarks."""
    parser = commands.add_parser(
        "step", description=__doc__, help="a training step", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="hub id, folder, GGUF file or pypi:// address")
    parser.add_argument("--precision", choices=DTYPES, default=Settings.precision, help="of the weights")
    parser.add_argument("--batch-size", type=_at_least(1), default=Settings.batch_size, help="rows a batch")
    parser.add_argument("--seq-len", type=_at_least(2), default=Settings.seq_len, help="random tokens a row")
    parser.add_argument("--data-path", type=Path, help="folder of SST-2 as JSON lines, not the package's sentiment set")
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
    parser.set_defaults(run=_run)


def run(settings: Settings) -> None:
    """Measures, prints four tables and writes them to one file."""
    # First, because where a process cannot reset its peak, a child begins with its parent's.
    memory = {row.name: _in_fresh_process(settings, row) for row in settings.chosen(ROWS)}
    module = _load(settings)
    context = machine() | {name: getattr(settings, name) for name in ("model", "precision", "batch_size", "seq_len")}
    print(", ".join(f"{name} {value}" for name, value in context.items()))

    tables: dict[str, list[Record]] = {}
    tables["random tokens"] = measure_random_tokens(settings, module, memory)
    print_table(f"{settings.batch_size} x {settings.seq_len} random tokens, all logits", tables["random tokens"])
    rows = settings.chosen([*DENSE, *SUBSPACE])
    tables["prompts"] = measure_prompts(
        module, rows, settings.data_path, settings.batch_size, settings.prompt_batches, settings.repeats
    )
    source = settings.data_path or "the packaged sentiment set"
    print_table(f"batches of {settings.batch_size} prompts from {source}", tables["prompts"])
    tables["noise"] = measure_noise(settings.noise_elements, settings.repeats)
    print_table(f"noise for {settings.noise_elements:,} elements", tables["noise"])
    tables["orthogonalization"] = measure_orthogonalization(module.model, RANK, POWER_RANK, settings.repeats)
    print_table(f"orthogonalization of a core of rank {RANK} for each matrix", tables["orthogonalization"])
    write_csv(settings.output, tables, context)
    print(f"\nwritten to {settings.output}")


def measure_random_tokens(settings: Settings, module: CausalLM, memory: dict[str, Memory]) -> list[Record]:
    """Median seconds of a step of each row on one batch, next to the memory measured before."""
    loss = partial(random_token_loss, module.model, _random_tokens(settings, module.model))
    rows = settings.chosen(ROWS)
    times = round_robin({row.name: partial(row.make(module.model), loss) for row in rows}, settings.repeats)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    forwards = {row.name: row.forwards for row in rows}
    forward_peak = memory[FORWARD.name].peak
    return [
        {
            "row": name,
            "seconds": medians[name],
            "min_seconds": min(times[name]),
            "over_its_forwards": medians[name] / (forwards[name] * medians[FORWARD.name]),
            "published_over_row": medians[PUBLISHED.name] / medians[name],
            "loading_peak_mib": used.loading / MIB,
            "loaded_mib": None if used.loaded is None else used.loaded / MIB,
            "peak_mib": used.peak / MIB,
            "peak_over_forward": used.peak / forward_peak,
            "state_mib": used.state / MIB,
            "stateless_peak_over_forward": (used.peak - used.state) / forward_peak,
        }
        for name, used in memory.items()
    ]


def random_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss of predicting every token but the first, from all logits."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def measure_memory(settings: Settings, name: str) -> Memory:
    """Runs a few steps of the row `name`; to be called in a process that has done nothing yet."""
    module = _load(settings)
    (row,) = (row for row in ROWS if row.name == name)
    loss = partial(random_token_loss, module.model, _random_tokens(settings, module.model))
    loading = peak_bytes()
    reset_peak()
    loaded = resident_bytes()
    step = row.make(module.model)
    for _ in range(MEMORY_STEPS):
        step(loss)
    return Memory(loading, loaded, peak_bytes(), state_bytes(step))


def _in_fresh_process(settings: Settings, row: Row) -> Memory:
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure_memory, settings, row.name).result()


def _load(settings: Settings) -> CausalLM:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return CausalLM(settings.model, dtype=DTYPES[settings.precision])


def _random_tokens(settings: Settings, model: PreTrainedModel) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (settings.batch_size, settings.seq_len), generator=generator)


def _run(arguments: argparse.Namespace) -> None:
    settings = {field.name: getattr(arguments, field.name) for field in fields(Settings)}
    run(Settings(**settings | {"rows": tuple(arguments.rows)}))


def _at_least(minimum: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return integer


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, got {text!r}: {error}") from None
    if not any(re.search(text, row.name) for row in ROWS):
        names = ", ".join(row.name for row in ROWS)
        raise argparse.ArgumentTypeError(f"must match the name of a row, got {text!r}; there are {names}")
    return text
