"""Seconds and memory of a training step, ours and as published.

On a CPU, times come from one process in which the rows take turns, and peaks of memory from a fresh process for each
row. On a GPU, where the states of all rows do not fit side by side, each row has the card and a new model to itself.
"""

import re
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning.bench.floors import Ceilings, floor_table, forward_flops, parameter_side_bytes
from zolightning.bench.measure import free_bytes, peak_bytes, reserved_peak_bytes, reset_peak, resident_bytes
from zolightning.bench.orthogonalization_cost import measure_orthogonalization
from zolightning.bench.prompts import Prompts, check_same_loss, time_prompts
from zolightning.bench.rows import (
    DENSE,
    FORWARD,
    POWER_RANK,
    PUBLISHED,
    PUBLISHED_ANSWERS,
    RANK,
    ROWS,
    SUBSPACE,
    Row,
    state_bytes,
)
from zolightning.bench.subject import Subject
from zolightning.commands.report import Record, round_robin

MEMORY_STEPS = 3
MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """The arguments of the command.

    Attributes:
        model: what ``model.model_name`` accepts: a hub id, a folder, a GGUF file or ``pypi://``; or ``config:`` and
            the name of a shape (:data:`zolightning.bench.shapes.SHAPES`), whose weights are random.
        precision: of the weights, and so of everything.
        device: ``cpu`` or ``cuda``.
        batch_size: rows of random tokens, and examples of prompts, a batch.
        seq_len: random tokens a row.
        data_path: folder of SST-2 as JSON lines; the package's sentiment set if not given.
        lengths: of the prompts of a model by shape: those of a task, or a number of tokens.
        prompt_batches: batches of prompts that a mean is taken over.
        noise_elements: elements of the tensor that noise is made for.
        rows: regular expressions; only rows whose names match one of them are measured, and those they are compared
            with. All rows where there is none.
        repeats: timed rounds, and passes over the prompts, that a median is taken over.
        threads: of torch; all that it takes by itself if not given.
        output: the file to write.
    """

    model: str
    precision: str = "bf16-true"
    device: str = "cpu"
    batch_size: int = 16
    seq_len: int = 32
    data_path: Path | None = None
    lengths: str | int = "sst2"
    prompt_batches: int = 8
    noise_elements: int = 10_000_000
    rows: tuple[str, ...] = ()
    repeats: int = 7
    threads: int | None = None
    output: Path = Path("logs/bench/step.csv")

    def chosen(self, rows: list[Row]) -> list[Row]:
        """Those of some rows that are to be measured."""
        return [row for row in rows if row in _COMPARED or not self.rows or self._matches(row)]

    def _matches(self, row: Row) -> bool:
        return any(re.search(pattern, row.name) for pattern in self.rows)


_COMPARED = (FORWARD, PUBLISHED, PUBLISHED_ANSWERS)


@dataclass(frozen=True)
class Memory:
    """Bytes of a process that does nothing but a few steps; on CUDA of the tensors that it holds there.

    Attributes:
        loading: peak until the model was loaded.
        loaded: held before the first step; None where the system does not say.
        peak: of the steps, or of everything where the system cannot tell them apart.
        state: kept by the step beside the weights.
        reserved: peak of what torch's allocator took of the card; None on a CPU.
        free: of the card, after the steps; None on a CPU.
    """

    loading: int
    loaded: int | None
    peak: int
    state: int
    reserved: int | None = None
    free: int | None = None


@dataclass(frozen=True)
class Workload:
    """What the figures of a row are computed from, beside its seconds.

    Attributes:
        forwards: of a step.
        tokens: of a forward.
        flops: of a forward.
        parameter_bytes: that a step moves at least beside its forwards; None where that is not known.
    """

    forwards: int
    tokens: float
    flops: float
    parameter_bytes: int | None


def measure_step(settings: Settings, ceilings: Ceilings) -> dict[str, list[Record]]:
    """The tables of a step: its cost on random tokens and on prompts, and the floors of both."""
    device = torch.device(settings.device)
    # First, because where a process cannot reset its peak, a child begins with its parent's.
    measure = _in_fresh_process if device.type == "cpu" else measure_memory
    memory = {row.name: measure(settings, row.name) for row in settings.chosen(ROWS)}
    rows = settings.chosen([*ROWS, PUBLISHED_ANSWERS])
    times: dict[str, list[float]] = {}
    prompt_times: dict[str, float] = {}
    tokens: dict[str, Workload] = {}
    prompts: dict[str, Workload] = {}
    for group in [rows] if device.type == "cpu" else [[row] for row in rows]:
        subject = load(settings)
        model, steps = subject.model, {row: row.make(subject.model) for row in group}
        loss = partial(random_token_loss, model, _random_tokens(settings, subject))
        on_tokens = {row.name: partial(step, loss) for row, step in steps.items() if row is not PUBLISHED_ANSWERS}
        times |= round_robin(on_tokens, settings.repeats)
        examples = subject.examples(settings.data_path, settings.lengths, settings.prompt_batches, settings.batch_size)
        if rows[0] in group:
            check_same_loss(model, examples[: settings.batch_size], subject.pad_id)
        batches = Prompts.of(examples, settings.batch_size, subject.pad_id, device)
        means = time_prompts([(step, batches.losses(row, model)) for row, step in steps.items()], settings.repeats)
        prompt_times |= dict(zip((row.name for row in group), means, strict=True))
        size, flops = settings.batch_size * settings.seq_len, forward_flops(loss)
        recipes = {row: PUBLISHED if row is PUBLISHED else FORWARD for row in group}  # whose forwards a row's are
        prompt_flops = {recipe: batches.flops(recipe, model) for recipe in set(recipes.values())}
        for row, step in steps.items():
            moved = 0 if row is FORWARD else parameter_side_bytes(model, step, row.forwards)
            tokens[row.name] = Workload(row.forwards, size, flops, moved)
            prompts[row.name] = Workload(row.forwards, batches.tokens(row), prompt_flops[recipes[row]], moved)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    on_prompts = [row.name for row in settings.chosen([PUBLISHED, PUBLISHED_ANSWERS, FORWARD, *DENSE, *SUBSPACE])]
    return {
        "random tokens": [_token_record(name, times, tokens[name], memory) for name in memory],
        "random tokens, rates": _rates({name: medians[name] for name in memory}, tokens, model, ceilings),
        "prompts": [_prompt_record(name, prompt_times, prompts[name]) for name in on_prompts],
        "prompts, rates": _rates({name: prompt_times[name] for name in on_prompts}, prompts, model, ceilings),
        "floors on random tokens": floor_table(model, tokens[FORWARD.name].flops, ceilings),
        "floors on prompts": floor_table(model, prompts[FORWARD.name].flops, ceilings),
        "orthogonalization": measure_orthogonalization(model, RANK, POWER_RANK, settings.repeats),
    }


def random_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss of predicting every token but the first, from all logits."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def measure_memory(settings: Settings, name: str) -> Memory:
    """Runs a few steps of the row `name`; on a CPU to be called in a process that has done nothing yet."""
    device = torch.device(settings.device)
    reset_peak(device)
    subject = load(settings)
    (row,) = (row for row in ROWS if row.name == name)
    loss = partial(random_token_loss, subject.model, _random_tokens(settings, subject))
    loading = peak_bytes(device)
    reset_peak(device)
    loaded = resident_bytes(device)
    step = row.make(subject.model)
    for _ in range(MEMORY_STEPS):
        step(loss)
    return Memory(
        loading, loaded, peak_bytes(device), state_bytes(step), reserved_peak_bytes(device), free_bytes(device)
    )


def load(settings: Settings) -> Subject:
    """The model, on its device."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return Subject.load(settings.model, settings.precision, torch.device(settings.device))


def _token_record(
    name: str, times: dict[str, list[float]], work: Workload, memory: dict[str, Memory]
) -> dict[str, Any]:
    median, used, forward_peak = statistics.median(times[name]), memory[name], memory[FORWARD.name].peak
    forward, published = (statistics.median(times[row.name]) for row in (FORWARD, PUBLISHED))
    return {
        "row": name,
        "seconds": median,
        "min_seconds": min(times[name]),
        "over_its_forwards": median / (work.forwards * forward),
        "published_over_row": published / median,
        "loading_peak_mib": used.loading / MIB,
        "loaded_mib": None if used.loaded is None else used.loaded / MIB,
        "peak_mib": used.peak / MIB,
        "peak_over_forward": used.peak / forward_peak,
        "state_mib": used.state / MIB,
        "stateless_peak_over_forward": (used.peak - used.state) / forward_peak,
        "reserved_peak_mib": None if used.reserved is None else used.reserved / MIB,
        "free_mib": None if used.free is None else used.free / MIB,
    }


def _prompt_record(name: str, means: dict[str, float], work: Workload) -> dict[str, Any]:
    return {
        "row": name,
        "mean_seconds": means[name],
        # The recipe's own forwards are others: of all candidates and all logits.
        "over_its_forwards": None if name == PUBLISHED.name else means[name] / (work.forwards * means[FORWARD.name]),
        "published_over_row": means[PUBLISHED.name] / means[name],
        "tokens_per_forward": work.tokens,
    }


def _rates(seconds: dict[str, float], work: dict[str, Workload], model: nn.Module, ceilings: Ceilings) -> list[Record]:
    """Beside what the machine does at best: tokens, products, and bytes of what a step adds to its forwards."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    forward = seconds[FORWARD.name]
    records: list[Record] = []
    for name, taken in seconds.items():
        of = work[name]
        products = of.forwards * of.flops / ceilings.flops_per_second
        moved = of.parameter_bytes
        floor = None if moved is None else products + moved / ceilings.bytes_per_second
        records.append(
            {
                "row": name,
                "tokens_per_second": of.tokens / taken,
                "flop_utilisation": products / taken,
                # As if the rest of the step were spent at the bandwidth of a copy
                "parameter_side_bytes_per_weight": (taken - of.forwards * forward)
                * ceilings.bytes_per_second
                / weights,
                "floor_bytes_per_weight": None if moved is None else moved / weights,
                "floor_seconds": floor,
                "over_floor": None if floor is None else taken / floor,
            }
        )
    return records


def _in_fresh_process(settings: Settings, name: str) -> Memory:
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure_memory, settings, name).result()


def _random_tokens(settings: Settings, subject: Subject) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch_size, settings.seq_len)
    return torch.randint(subject.vocabulary, shape, generator=generator).to(settings.device)
