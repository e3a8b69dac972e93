"""Files of a measurement, and the machine it was made on."""

import csv
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from zolightning.bench.measure import CPU
from zolightning.commands.tables import Record
from zolightning.versions import installed_version


def write_csv(path: Path, tables: Mapping[str, Sequence[Record]], context: Record) -> None:
    """Writes all tables to one file: a line has the name of its table, its record, and the context."""
    lines = [{"table": table, **record, **context} for table, records in tables.items() for record in records]
    columns = [column for column in dict.fromkeys(key for line in lines for key in line) if column not in context]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *context], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def machine(device: torch.device = CPU) -> dict[str, str | int | None]:
    """What figures depend on beside the arguments; of a card, its software and how much is free: None without one."""
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
