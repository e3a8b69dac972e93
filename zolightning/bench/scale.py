"""The command ``python -m zolightning.bench scale``: steps a second of two processes over those of one, on CPUs.

The processes have a thread each and the same global batch: they split the batch (data), the queries of a step (query)
or its two signs (sign). The ways take turns in the same two processes; the second one waits while the first is alone.
What they exchange is counted where it is handed to ``torch.distributed``, for a small model as well as a large one.
"""

import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from zolightning.bench.figures import write_csv
from zolightning.bench.measure import environment, machine
from zolightning.bench.options import Precision, option
from zolightning.bench.shapes import SHAPES, model_of_shape
from zolightning.bench.subject import DTYPES
from zolightning.callbacks import ZerothOrder
from zolightning.commands.configured_trainer import SILENT
from zolightning.commands.quiet import hush, quiet
from zolightning.commands.tables import Record, print_table
from zolightning.malloc import keep_freed_memory
from zolightning.optim import MeZO
from zolightning.strategies import ZerothOrderDDP
from zolightning.weights_digest import weights_digest

_EXCHANGES = ("all_reduce", "all_gather", "all_gather_into_tensor", "barrier", "broadcast", "reduce")


@dataclass(frozen=True)
class Way:
    """How a step is shared: the number of ranks, how many of them share its evaluations, and its queries."""

    ranks: int
    perturbation_parallel_size: int
    num_queries: int


WAYS = {
    "one process, 2 queries": Way(1, 1, 2),
    "data": Way(2, 1, 2),
    "query": Way(2, 2, 2),
    "one process, 1 query": Way(1, 1, 1),
    "sign": Way(2, 2, 1),
}


@dataclass(frozen=True)
class Settings:
    """The options of the benchmark."""

    model: str = option("shape, with random weights", "small", choices=SHAPES)
    precision: Precision = option("of the weights", "bf16-true")
    batch_size: int = option("rows of the global batch, even", 16)
    seq_len: int = option("random tokens a row", 256)
    steps: int = option("timed steps of each way in a round", 3)
    rounds: int = option("turns of each way", 2)
    output: Path = option("file to write", Path("logs/bench/scale.csv"))


class LastToken(L.LightningModule):
    """The cross-entropy of a token after each row."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ids, targets = batch
        logits = self.network(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return F.cross_entropy(logits[:, -1].float(), targets)

    def configure_optimizers(self) -> None:
        return None  # ZerothOrder's


class Clock(Callback):
    """Measures each step except for the first, which also sets things up.

    For each step it keeps seconds, CPU seconds, the number and bytes of sums over ranks, and the number and bytes of
    other exchanges.
    """

    def __init__(self) -> None:
        self.counts = [0, 0, 0, 0]
        self._ends: list[tuple[float, ...]] = []

    @property
    def steps(self) -> list[tuple[float, ...]]:
        pairs = zip(self._ends, self._ends[1:], strict=False)
        return [tuple(b - a for a, b in zip(start, end, strict=True)) for start, end in pairs]

    def on_train_batch_end(self, *_: Any) -> None:
        self._ends.append((time.perf_counter(), time.process_time(), *self.counts))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what this process hands to ``torch.distributed``."""
        own = {name: getattr(dist, name) for name in _EXCHANGES}
        for name, call in own.items():
            setattr(dist, name, partial(self._count, call))
        try:
            yield
        finally:
            for name, call in own.items():
                setattr(dist, name, call)

    def _count(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        place = 0 if call.__name__ == "all_reduce" else 2
        self.counts[place] += 1
        self.counts[place + 1] += sum(value.nbytes for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return call(*args, **kwargs)


def run(settings: Settings) -> None:
    """Measures, prints the tables and writes them to one file."""
    torch.set_num_threads(1)
    tables = _in_two_processes(settings)
    print_table(f"{settings.batch_size} x {settings.seq_len} tokens of {settings.model}, MeZO", tables["scale"])
    print_table("exchanges of a step", tables["exchanges"])
    context = machine() | {name: value for name, value in vars(settings).items() if name != "output"}
    write_csv(settings.output, tables, context)
    print(f"\nwritten to {settings.output}")


def _in_two_processes(settings: Settings) -> dict[str, list[Record]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = get_context("spawn")
    receiver, sender = processes.Pipe(duplex=False)
    started = []
    for rank in range(2):
        names = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with environment((names | {"OMP_NUM_THREADS": "1"}).items()):
            started.append(processes.Process(target=_measure, args=(settings, rank, None if rank else sender)))
            started[-1].start()
    sender.close()
    with receiver:
        try:
            return receiver.recv()
        except EOFError:
            raise SystemExit("A process of the benchmark failed; what it says is above.") from None
        finally:
            for process in started:
                process.join()
                process.close()


def _measure(settings: Settings, rank: int, sender: Any) -> None:
    keep_freed_memory()
    hush()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = _measure_ways(settings, rank)
    small = Settings("tiny", settings.precision, settings.batch_size, settings.seq_len, settings.steps, 1)
    counted = {settings.model: found, small.model: _measure_ways(small, rank)}
    if sender is not None:
        rows = [row for item in counted.items() for row in _exchanged(*item)]
        sender.send({"scale": _scale(found), "exchanges": rows})
    dist.barrier()
    dist.destroy_process_group()


def _measure_ways(settings: Settings, rank: int) -> dict[str, list[Any]]:
    """For each way, by its name: for each rank, the steps that it took and a digest of its weights."""
    found: dict[str, list[Any]] = {name: [[[], ""] for _ in range(way.ranks)] for name, way in WAYS.items()}
    for _ in range(settings.rounds):
        for name, way in WAYS.items():
            own = _fit(settings, way) if rank < way.ranks else None
            everyone: list[Any] = [None, None]
            dist.all_gather_object(everyone, own)
            for kept, (steps, digest) in zip(found[name], everyone, strict=False):
                kept[0] += steps
                kept[1] = digest
    return found


def _fit(settings: Settings, way: Way) -> tuple[list[tuple[float, ...]], str]:
    network = model_of_shape(settings.model, getattr(torch, DTYPES[settings.precision]))
    module, clock, steps = LastToken(network.train()), Clock(), settings.steps + 1
    generator, rows = torch.Generator().manual_seed(0), settings.batch_size * steps
    vocabulary = network.config.vocab_size
    ids = torch.randint(vocabulary, (rows, settings.seq_len), generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    size = way.perturbation_parallel_size
    with quiet(), clock.counting():
        trainer = L.Trainer(
            accelerator="cpu",
            devices=way.ranks,
            strategy=ZerothOrderDDP(perturbation_parallel_size=size) if way.ranks > 1 else "auto",
            precision=settings.precision,
            max_steps=steps,
            callbacks=[ZerothOrder(partial(MeZO, lr=1e-6, num_queries=way.num_queries)), clock],
            use_distributed_sampler=False,
            **SILENT,
        )
        share = range(trainer.global_rank // size, rows, way.ranks // size)
        data = DataLoader(TensorDataset(ids, targets), settings.batch_size * size // way.ranks, sampler=share)
        trainer.fit(module, data)
    return clock.steps, weights_digest(dict(module.named_parameters()))


def _scale(found: dict[str, list[Any]]) -> list[Record]:
    records: list[Record] = []
    alone = {WAYS[name].num_queries: name for name in WAYS if WAYS[name].ranks == 1}
    for name, ranks in found.items():
        one = found[alone[WAYS[name].num_queries]]
        seconds, cpu = _slowest(ranks, 0), _slowest(ranks, 1)
        digests = {digest for _, digest in ranks}
        same = "one process" if digests == {one[0][1]} else "each other" if len(digests) == 1 else "none"
        records.append(
            {
                "split by": name,
                "seconds": seconds,
                "steps a second": 1 / seconds,
                "over one": _slowest(one, 0) / seconds,
                "CPU seconds": cpu,
                "over one in CPU seconds": _slowest(one, 1) / cpu,
                "same bits as": same,
            }
        )
    return records


def _slowest(ranks: list[Any], column: int) -> float:
    """The median of a step of the rank that takes longest."""
    return max(statistics.median(step[column] for step in steps) for steps, _ in ranks)


def _exchanged(model: str, found: dict[str, list[Any]]) -> list[Record]:
    """What a rank hands over in a step; Lightning broadcasts each time whether a SIGTERM came."""
    parameters = sum(parameter.numel() for parameter in model_of_shape(model, device="meta").parameters())
    rows: list[Record] = []
    for name, ranks in found.items():
        if WAYS[name].ranks > 1:
            counts = (max(column) for column in zip(*(step[2:] for steps, _ in ranks for step in steps), strict=True))
            columns = ("sums", "bytes of sums", "of Lightning", "bytes of Lightning")
            what: dict[str, Any] = {"network": model, "parameters": parameters, "split by": name}
            rows.append(what | dict(zip(columns, counts, strict=True)))
    return rows
