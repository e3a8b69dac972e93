"""What a training step takes in time and memory, ours and as published: ``python -m zolightning.bench step``.

On a CPU, times come from one process in which the rows take turns, and peaks of memory from a fresh process for each
row; all rows take half an hour on two cores. On a GPU, where the states of all rows do not fit side by side,
each row has the card and a new model to itself.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning.bench.figures import write_csv
from zolightning.bench.floors import Ceilings, floor_table, forward_flops, parameter_side_bytes
from zolightning.bench.lengths import LENGTHS
from zolightning.bench.measure import (
    free_bytes,
    in_fresh_process,
    machine,
    peak_bytes,
    release,
    require,
    reserved_peak_bytes,
    reset_peak,
    resident_bytes,
)
from zolightning.bench.options import Precision, option, require_at_least
from zolightning.bench.prompts import Prompts, check_same_loss, time_prompts
from zolightning.bench.rows import (
    BY_NAME,
    FORWARD,
    GRAPHED,
    PARITY,
    POWER_RANK,
    PUBLISHED,
    PUBLISHED_ANSWERS,
    RANK,
    ROWS,
    Row,
    state_bytes,
)
from zolightning.bench.shapes import PREFIX
from zolightning.bench.step_parts import measure_noise, measure_orthogonalization
from zolightning.bench.step_records import Cost, Memory, Workload, memory_record, prompt_record, rates, token_record
from zolightning.bench.subject import DTYPES, Subject
from zolightning.commands.tables import Record, print_table
from zolightning.commands.timing import round_robin
from zolightning.models.attention_masks import attention_mask_for

MEMORY_STEPS = 3
_COMPARED = (FORWARD, PUBLISHED, PUBLISHED_ANSWERS)  # with which the other rows are


@dataclass(frozen=True)
class Settings:
    """The options of ``step``."""

    model: str = option("hub id, folder, GGUF file, pypi:// address, or config: and the name of a shape")
    precision: Precision = option("of the weights, and so of all computation", "bf16-true")
    device: str = option("where to run", "cpu", choices=("cpu", "cuda"))
    batch_size: int = option("rows of random tokens, and examples of prompts, a batch", 16)
    seq_len: int = option("random tokens a row", 32)
    data_path: Path | None = option("folder of SST-2 as JSON lines, not the package's sentiment set", None)
    lengths: str = option("prompts of a model by shape: as long as those of a task, or so many tokens each", "sst2")
    prompt_batches: int = option("batches of prompts that a mean is taken over", 8)
    noise_elements: int = option("elements to make noise for", 10_000_000)
    rows: list[str] = option("regular expressions: the rows to measure, besides those they are compared with", [])
    repeats: int = option("rounds that a median is taken over", 7)
    threads: int | None = option("of torch; its own choice if not given", None)
    output: Path = option("file to write", Path("logs/bench/step.csv"))

    def __post_init__(self) -> None:
        require_at_least(self, batch_size=1, seq_len=2, prompt_batches=1, noise_elements=1, repeats=1, threads=1)
        if self.lengths not in LENGTHS and not (self.lengths.isdecimal() and int(self.lengths)):
            accepted = f"one of {', '.join(LENGTHS)}, or a number of tokens"
            raise SystemExit(f"`--lengths` must be {accepted}, got {self.lengths!r}.")
        for pattern in self.rows:
            try:
                found = any(re.search(pattern, name) for name in BY_NAME)
            except re.error as error:
                raise SystemExit(f"`--rows` must be regular expressions, got {pattern!r}: {error}.") from None
            if not found:
                raise SystemExit(f"`--rows` {pattern!r} matches no row; there are {', '.join(BY_NAME)}.")

    def chosen(self, rows: list[Row]) -> list[Row]:
        """The rows that are to be measured, out of `rows`."""
        patterns = self.rows or [""]
        return [row for row in rows if row in _COMPARED or any(re.search(pattern, row.name) for pattern in patterns)]


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
        write_csv(settings.output, tables, context)  # what there is so far, in case the rest fails
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


def measure_step(settings: Settings, ceilings: Ceilings) -> Iterator[tuple[str, list[Record]]]:
    """The tables of a step, by name as soon as they are there: costs on random tokens, on prompts, and the floors.

    Progress goes to the error output. The first table comes twice, at first with the memory of its rows only.
    """
    is_cpu = settings.device == "cpu"
    chosen = settings.chosen(ROWS if is_cpu else [*ROWS, *GRAPHED, *PARITY])
    memory: dict[str, Memory] = {}
    for number, row in enumerate(chosen, 1):
        _say(f"memory, {number} of {len(chosen)}: {row.name}")
        release(torch.device(settings.device))
        if is_cpu or row.environment:
            memory[row.name] = in_fresh_process(measure_memory, settings, row.name, variables=row.environment)
        else:
            memory[row.name] = measure_memory(settings, row.name)
    yield "random tokens", [{"row": name} | memory_record(memory[name], memory) for name in memory]
    costs: dict[str, Cost] = {}
    rows = [*chosen, PUBLISHED_ANSWERS]
    for group in [rows] if is_cpu else [[row] for row in rows]:
        names = [row.name for row in group]
        release(torch.device(settings.device))
        if group[0].environment:
            costs |= in_fresh_process(measure_costs, settings, names, variables=group[0].environment)
        else:
            costs |= measure_costs(settings, names)
    model = load(settings).model
    weights = sum(parameter.numel() for parameter in model.parameters())
    forward, on_prompts = costs[FORWARD.name], [PUBLISHED.name, PUBLISHED_ANSWERS.name, FORWARD.name]
    on_prompts += [name for name in memory if name not in on_prompts]
    yield "random tokens", [token_record(name, costs) | memory_record(memory[name], memory) for name in memory]
    yield (
        "random tokens, rates",
        [rates(name, costs[name].median, costs[name].tokens, weights, ceilings, forward.median) for name in memory],
    )
    yield "prompts", [prompt_record(name, costs) for name in on_prompts]
    yield (
        "prompts, rates",
        [
            rates(name, costs[name].prompt_seconds, costs[name].prompts, weights, ceilings, forward.prompt_seconds)
            for name in on_prompts
        ],
    )
    yield "floors on random tokens", floor_table(model, forward.tokens.flops, ceilings)
    yield "floors on prompts", floor_table(model, forward.prompts.flops, ceilings)
    yield "orthogonalization", measure_orthogonalization(model, RANK, POWER_RANK, settings.repeats)


def measure_costs(settings: Settings, names: Sequence[str]) -> dict[str, Cost]:
    """Times rows that share a model, in turns; returns by name what they take."""
    title = f"time, {len(names)} rows in turns" if len(names) > 1 else f"time, {names[0]}"
    subject, rows = load(settings), [BY_NAME[name] for name in names]
    model, steps = subject.model, {row: row.make(subject.model) for row in rows}
    loss = partial(random_token_loss, model, _random_tokens(settings, subject))
    # On random tokens the published recipe has only one way.
    on_tokens = {row.name: partial(step, loss) for row, step in steps.items() if row is not PUBLISHED_ANSWERS}
    times = round_robin(on_tokens, settings.repeats, lambda progress: _say(f"{title}, random tokens: {progress}"))
    examples = subject.examples(settings.data_path, settings.lengths, settings.prompt_batches, settings.batch_size)
    if FORWARD in rows:
        check_same_loss(model, examples[: settings.batch_size], subject.pad_id)
    prompts = Prompts.of(examples, settings.batch_size, subject.pad_id, torch.device(settings.device))
    work = [(step, prompts.losses(row, model)) for row, step in steps.items()]
    means = time_prompts(work, settings.repeats, say=lambda progress: _say(f"{title}, prompts: {progress}"))
    size, flops = settings.batch_size * settings.seq_len, forward_flops(loss)
    recipes = {row: PUBLISHED if row is PUBLISHED else FORWARD for row in rows}  # whose forwards a row's are
    prompt_flops = {recipe: prompts.flops(recipe, model) for recipe in set(recipes.values())}
    costs = {}
    for (row, step), mean in zip(steps.items(), means, strict=True):
        moved = 0 if row is FORWARD else parameter_side_bytes(model, step, row.forwards)
        costs[row.name] = Cost(
            [seconds / row.steps for seconds in times.get(row.name, [])],
            mean / row.steps,
            Workload(row.forwards, size, flops, moved),
            Workload(row.forwards, prompts.tokens(row), prompt_flops[recipes[row]], moved),
        )
    return costs


def random_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss of predicting every token but the first, from all logits."""
    inputs = {} if tokens.is_cpu else mask_inputs(model, tokens)
    logits = model(input_ids=tokens, use_cache=False, **inputs).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def mask_inputs(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """A mask, without which a network of Hugging Face's waits for its device, and positions if it cannot count them."""
    mask = attention_mask_for(model, torch.ones_like(tokens))
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return {"attention_mask": mask, "position_ids": positions} if mask.ndim == 4 else {"attention_mask": mask}


def measure_memory(settings: Settings, name: str) -> Memory:
    """Runs a few steps of the row `name`; on a CPU to be called in a process that has done nothing yet."""
    device = torch.device(settings.device)
    subject = load(settings)
    loss = partial(random_token_loss, subject.model, _random_tokens(settings, subject))
    loading = peak_bytes(device)
    reset_peak(device)
    loaded = resident_bytes(device)
    step = BY_NAME[name].make(subject.model)
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


def _random_tokens(settings: Settings, subject: Subject) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch_size, settings.seq_len)
    return torch.randint(subject.vocabulary, shape, generator=generator).to(settings.device)


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
