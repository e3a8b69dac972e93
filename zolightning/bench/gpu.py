"""Measures a GPU in eight minutes: ``python -m zolightning.bench gpu``.

What is known least comes first: do the loops over parameters write the same bits as on the CPU; is a run the same when
it is resumed, and without CUDA graphs; what do whole steps take, in time and memory, on models by shape, with graphs
and without, ours and published; in pieces of which size is a large matrix multiplied fastest; how near do the loops
come to the bandwidth of the card, and what do they cost without Triton. Each part runs in processes of its own and has
a time limit. Its figures are appended to one CSV file as soon as they are there, a line each; a part that fails or runs
out of time leaves a line that says so, and the next part follows.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch

from zolightning.bench.bits import HUGE, comparisons
from zolightning.bench.figures import COLUMNS, Figures, append
from zolightning.bench.floors import Ceilings, floor_table
from zolightning.bench.kernel_cost import measure_kernels, measure_pieces
from zolightning.bench.measure import environment, machine, release, require
from zolightning.bench.options import Device, option
from zolightning.bench.repetition import compare, runs
from zolightning.bench.rows import BY_NAME, FORWARD, GRAPHED, PARITY, PUBLISHED_ANSWERS
from zolightning.bench.step import Settings as StepSettings
from zolightning.bench.step import load, measure_costs, measure_memory
from zolightning.bench.step_records import Cost, Memory, memory_record, prompt_record, rates, token_record
from zolightning.commands.tables import Record
from zolightning.cublas import repeat_products

_CASES = 10  # comparisons of bits to a line


@dataclass(frozen=True)
class Settings:
    """The options of the benchmark."""

    device: Device = option("where to run", "cuda")
    miniature: bool = option("tiny sizes, to see that everything runs", False)
    parts: list[str] = option("regular expressions: the parts to run; all if not given", [])
    output: Path = option("file to append to", Path("logs/bench/gpu.csv"))


@dataclass(frozen=True)
class Steps:
    """Steps of one model."""

    settings: StepSettings  # the model and its batches
    # names of rows.py, in the order in which they are measured; the first is the forward, with
    # which the others are compared
    rows: tuple[str, ...]
    limit: float  # seconds that all of it may take


@dataclass(frozen=True)
class Sizes:
    """The sizes of all parts."""

    bits: int = 100_003  # number of elements of the tensors whose bits are compared
    # number of processes that share the comparisons: for each of these the host compiles a loop or two
    bits_processes: int = 12
    huge: int | None = HUGE  # number of elements of a tensor that int32 cannot count; None: no such tensor
    # numbers of elements of the weights that kernels are timed on
    kernels: tuple[int, ...] = (16 * 2**20, 4096 * 14336, 128256 * 4096)
    # shape of the matrix that is multiplied in pieces, by inputs of as many `tokens`: OPT-13B's
    product: tuple[int, int] = (20480, 5120)
    tokens: tuple[int, ...] = (304, 608, 4096)
    # the models whose steps are measured; the last one is also measured without Triton
    steps: tuple[Steps, ...] = (
        Steps(
            StepSettings("config:opt-13b", seq_len=32, prompt_batches=4, repeats=5),
            (
                *("forward", "forward, CUDA graphs", "MeZO, CUDA graphs"),
                *("MeZO, both signs in one forward, CUDA graphs", "LOZO rank 4, CUDA graphs", "published"),
            ),
            100,
        ),
        Steps(
            StepSettings("config:llama-3-8b", seq_len=64, lengths="256", prompt_batches=2, repeats=5),
            (
                *("forward", "forward, CUDA graphs", "LOZO rank 4, CUDA graphs", "MeZO, CUDA graphs", "LOZO rank 4"),
                *("MeZO", "MeZO native", "SubZero rank 64", "ZO-MOPI rank 64, power rank 16"),
            ),
            100,
        ),
        Steps(
            StepSettings("config:opt-1.3b", seq_len=32, prompt_batches=4, repeats=5),
            ("forward", "forward, CUDA graphs", "published", "MeZO, CUDA graphs", "LOZO rank 4, CUDA graphs", "MeZO"),
            50,
        ),
    )
    repeated_shape: str = "smollm2-135m"  # the model whose training is repeated
    repeated_processes: int = 6  # number of processes that share these runs, which leave a card idle most of the time
    repeated_steps: int = 8  # steps of each repeated run


_TINY = Steps(
    StepSettings("config:tiny", batch_size=2, seq_len=8, prompt_batches=1, repeats=1),
    ("forward", "MeZO", "MeZO, CUDA graphs", "LOZO rank 4", "published", "published, answer logits"),
    60,
)
MINIATURE = Sizes(1003, 1, None, (5000,), (64, 32), (4,), (_TINY,), "tiny", 1, 2)


@dataclass(frozen=True)
class Part:
    """A part of the run."""

    name: str  # name in the file
    limit: float  # seconds that it may take
    # functions that write its figures, each in a process of its own, all at once
    runs: tuple[Callable[[torch.device, Figures], None], ...]
    environment: tuple[tuple[str, str], ...] = ()  # environment variables of these processes


def parts(sizes: Sizes) -> list[Part]:
    """The parts, the most important first; they take eight minutes if each uses all of its time."""
    parity = sizes.steps[-1].settings  # beside the row MeZO of the same model, whose loops are in Triton
    return [
        Part("bits", 115, tuple(partial(_bits, sizes, place) for place in range(sizes.bits_processes))),
        Part("resume", 45, tuple(partial(_resume, sizes, place) for place in range(sizes.repeated_processes))),
        *(Part(f"steps of {steps.settings.model}", steps.limit, (partial(_steps, steps),)) for steps in sizes.steps),
        Part("pieces", 15, (partial(_pieces, sizes),)),
        Part("kernels", 15, (partial(_kernels, sizes),)),
        *(Part(row.name, 20, (partial(_parity, parity, row.name),), row.environment) for row in PARITY),
    ]


def run_part(part: Part, device: torch.device, path: Path) -> None:
    """Runs a part in processes of its own, which are killed when its time is over, and writes how long they took."""
    begin, figures = time.monotonic(), Figures(path, part.name)
    append(path, COLUMNS, [])  # the header, which otherwise each of several processes would write
    context = get_context("spawn")
    processes = [context.Process(target=run_here, args=(part, device, path, place)) for place in range(len(part.runs))]
    with environment(part.environment):
        for process in processes:
            process.start()
    for process in processes:
        process.join(max(0.0, begin + part.limit - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join(5)  # a driver that hangs may keep it
            figures.write("part", out_of_time=part.limit)
        elif process.exitcode:
            figures.write("part", failed=f"exit status {process.exitcode}")
    figures.write("part", seconds=time.monotonic() - begin)


def run_here(part: Part, device: torch.device, path: Path, place: int = 0) -> None:
    """Runs one of a part's runs in this process, and writes whether it got to its end."""
    repeat_products()  # environment variables are inherited from the parent process, torch's settings are not
    figures = Figures(path, part.name)
    with figures.guarded("part"):
        part.runs[place](device, figures)
        figures.write("part", finished=1)


def _bits(sizes: Sizes, place: int, device: torch.device, figures: Figures) -> None:
    """Every `bits_processes`-th comparison, beginning with number `place`."""
    if place == 0:
        figures.write("machine", **machine(device))
    cases = equal = 0
    for name, differing in islice(comparisons(sizes.bits, sizes.huge), place, None, sizes.bits_processes):
        cases += 1
        with figures.guarded(name):
            if count := differing(device):
                figures.write(name, differing=count)
            else:
                equal += 1
        if cases % _CASES == 0:  # the part may not get to its end
            figures.write(f"the first {cases} from {place}", equal=equal)
    figures.write(f"all from {place}", cases=cases, equal=equal)


def _kernels(sizes: Sizes, device: torch.device, figures: Figures) -> None:
    for record in measure_kernels(device, sizes.kernels, _ceilings(device, figures)):
        figures.write(**record)


def _pieces(sizes: Sizes, device: torch.device, figures: Figures) -> None:
    for record in measure_pieces(device, *sizes.product, sizes.tokens):
        figures.write(**record)


def _steps(steps: Steps, device: torch.device, figures: Figures) -> None:
    settings, ceilings = replace(steps.settings, device=device.type), _ceilings(device, figures)
    shape = load(replace(settings, device="meta")).model
    weights = sum(parameter.numel() for parameter in shape.parameters())
    costs: dict[str, Cost] = {}
    memory: dict[str, Memory] = {}
    for row in (BY_NAME[name] for name in steps.rows):
        if row in GRAPHED and device.type != "cuda":
            continue
        name = row.name
        with figures.guarded(name):
            release(device)
            costs |= measure_costs(settings, [name])
            cost, forward = costs[name], costs[FORWARD.name]
            of_prompts = rates(name, cost.prompt_seconds, cost.prompts, weights, ceilings, forward.prompt_seconds)
            _write(figures, f"{name}, prompts", prompt_record(name, costs) | of_prompts)
            if row is PUBLISHED_ANSWERS:  # whose step on random tokens is that of PUBLISHED
                continue
            of_tokens = rates(name, cost.median, cost.tokens, weights, ceilings, forward.median)
            _write(figures, f"{name}, random tokens", token_record(name, costs) | of_tokens)
            release(device)
            memory[name] = measure_memory(settings, name)
            _write(figures, f"{name}, memory on random tokens", memory_record(memory[name], memory))
            if row is FORWARD:
                for where, work in {"random tokens": cost.tokens, "prompts": cost.prompts}.items():
                    for floor in floor_table(shape, work.flops, ceilings):
                        _write(figures, f"floor on {where}: {floor['row']}", floor)


def _write(figures: Figures, name: str, record: Record) -> None:
    figures.write(name, **{figure: value for figure, value in record.items() if figure != "row"})


def _resume(sizes: Sizes, place: int, device: torch.device, figures: Figures) -> None:
    """Every `repeated_processes`-th run, beginning with number `place`."""
    for name, method, cuda_graphs in islice(runs(device), place, None, sizes.repeated_processes):
        with figures.guarded(name):
            found = compare(method, cuda_graphs, device, sizes.repeated_shape, sizes.repeated_steps)
            figures.write(name, **found)


def _parity(settings: StepSettings, name: str, device: torch.device, figures: Figures) -> None:
    cost = measure_costs(replace(settings, device=device.type), [name])[name]
    figures.write(name, seconds=cost.median, mean_seconds=cost.prompt_seconds)


def _ceilings(device: torch.device, figures: Figures) -> Ceilings:
    ceilings = Ceilings.measure(device, torch.bfloat16)
    figures.write(
        "ceilings",
        copy_gb_per_second=ceilings.bytes_per_second / 1e9,
        product_tflop_per_second=ceilings.flops_per_second / 1e12,
    )
    return ceilings


def run(settings: Settings) -> None:
    """Runs the parts, one after the other."""
    device = torch.device(settings.device)
    require(device)
    for part in parts(MINIATURE if settings.miniature else Sizes()):
        if not settings.parts or any(re.search(pattern, part.name) for pattern in settings.parts):
            run_part(part, device, settings.output)
    print(f"\nappended to {settings.output}")
