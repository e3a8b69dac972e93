"""Time and memory: of a process on CPUs, of torch's allocator and the whole card on CUDA; and which machine it is."""

import gc
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from zolightning.callbacks.run_monitor import peak_memory, process_memory
from zolightning.commands.timing import seconds_of
from zolightning.versions import installed_version

_CLEAR = Path("/proc/self/clear_refs")
CPU = torch.device("cpu")
Result = TypeVar("Result")


def peak_bytes(device: torch.device = CPU) -> int:
    """The most memory held since :func:`reset_peak` where that is possible: by tensors on CUDA, else by the process."""
    return peak_memory(device)


def resident_bytes(device: torch.device = CPU) -> int | None:
    """The memory that is held now, as :func:`peak_bytes` counts it; None where the system does not tell."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else process_memory("VmRSS")


def reset_peak(device: torch.device = CPU) -> bool:
    """Resets the peak to what is held now; returns False where the system has no way to do so.

    What was freed goes back to the system, or to the card, first.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5")  # see proc(5): "reset the peak resident set size"
    except OSError:
        return False
    return True


def release(device: torch.device) -> None:
    """Returns freed memory to the card; does nothing on a CPU."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def reserved_peak_bytes(device: torch.device) -> int | None:
    """The most that torch's allocator has taken of the card since :func:`reset_peak`; None where there is no card."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def free_bytes(device: torch.device) -> int | None:
    """Free bytes of the card, after what other processes use; None without a card."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def kernel_seconds(call: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median seconds of work that `call` starts on `device`; on CUDA without the host's time for launching it.

    There, a pass over 256 MB comes before each call: it empties the second-level cache, and while it runs the host has
    time to queue what comes next.
    """
    call()  # what happens only once is not timed
    if device.type == "cuda":
        flush = torch.empty(2**28, dtype=torch.int8, device=device)
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in events:
            flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        return statistics.median(start.elapsed_time(end) / 1e3 for start, end in events)
    return statistics.median(seconds_of(call) for _ in range(repeats))


def in_fresh_process(
    function: Callable[..., Result], *arguments: Any, variables: Iterable[tuple[str, str]] = ()
) -> Result:
    """Calls `function` in a fresh process with these environment variables, and returns its result."""
    with environment(variables), ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def environment(variables: Iterable[tuple[str, str]]) -> Iterator[None]:
    """A context with these environment variables, which processes started within it inherit."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def require(device: torch.device) -> None:
    """Raises a SystemExit with one line if there is no such device."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("`--device` is cuda, but PyTorch finds no GPU that it can use. Use cpu.")


def machine(device: torch.device = CPU) -> dict[str, str | int | None]:
    """What figures depend on besides the arguments; the card, its software and its free memory are None without one."""
    host: dict[str, str | int | None] = {
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if device.type != "cuda":
        return host | dict.fromkeys(("gpu", "gpu_gib", "gpu_free_gib", "driver", "cuda", "triton"))
    free, total = torch.cuda.mem_get_info(device)
    return host | {
        "gpu": torch.cuda.get_device_name(device),
        "gpu_gib": f"{total / 2**30:.1f}",
        "gpu_free_gib": f"{free / 2**30:.1f}",
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "triton": installed_version("triton"),
    }


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
