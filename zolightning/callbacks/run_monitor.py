"""Logs what a run costs: time and memory."""

import math
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from zolightning.messages import in_units
from zolightning.partners import add_text, log_interval, log_number, methods_of, tensorboards
from zolightning.rank_zero import rank_zero_info


class RunMonitor(Callback):
    """Logs speed, memory and one sample of the data.

    It logs ``run/steps_per_second`` (mean over the last ``log_every_n_steps`` training steps, including the loading of
    their batches, but without validations and without steps that a resumed run takes from a ledger),
    ``run/peak_memory_gib`` (the largest so far of the process; on CUDA of the device's allocator) and, as
    ``method/...``, diagnostics of the method, such as quantiles of HiZOO's curvature. When training starts, it writes
    the text of a training example to TensorBoard, as ``prompt``, if the datamodule has ``sample_text()``. When the fit
    ends, it prints how much memory the method's state takes: for a subspace method that includes the state of exact
    updates only once it has first added updates to the weights.
    """

    def __init__(self) -> None:
        self._started: float | None = None  # when the current step began; None until its batch is there
        self._step = 0  # the last one that was taken
        self._seconds: deque[float] = deque()  # durations of the latest steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seconds = deque(maxlen=log_interval(trainer))
        self._started, self._step = None, trainer.global_step
        sample_text = getattr(getattr(trainer, "datamodule", None), "sample_text", None)
        if sample_text is not None and tensorboards(trainer):
            add_text(trainer, "prompt", sample_text())

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if any(method.is_replaying for method in methods_of(trainer)):
            self._started = None
        elif self._started is None:
            self._started = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:  # one of several batches whose gradients are accumulated
            return
        now, self._step = time.perf_counter(), trainer.global_step
        if self._started is not None:
            self._seconds.append(now - self._started)
        self._started = now
        if trainer.global_step % log_interval(trainer):
            return
        if self._seconds:
            log_number(pl_module, "run/steps_per_second", len(self._seconds) / sum(self._seconds))
        with suppress(ModuleNotFoundError):  # of `resource`: Windows does not tell
            log_number(pl_module, "run/peak_memory_gib", peak_memory(pl_module.device) / 2**30)
        for method in methods_of(trainer):
            for name, value in method.measurements().items():
                log_number(pl_module, f"method/{name}", value)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for method in methods_of(trainer):
            weights = sum(math.prod(method.trainable_shape(p)) * p.element_size() for _, _, p in method.trainable())
            host = f" and {in_units(method.host_bytes())} in host memory" if method.host_bytes() else ""
            rank_zero_info(
                f"{type(method).__name__} kept {in_units(method.state_bytes())} of state{host} for "
                f"{in_units(weights)} of trainable weights."
            )


def peak_memory(device: torch.device) -> int:
    """The largest number of bytes held so far: by tensors on a CUDA device, on others by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if peak := process_memory("VmHWM"):
        return peak
    import resource  # not on Windows

    # Only the fallback: on Linux a process inherits its parent's.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def process_memory(field: str) -> int | None:
    """Bytes that Linux reports for this process: "VmRSS" is held now, "VmHWM" is the peak; None on other systems."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kibibytes = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return next((int(number) * 1024 for number in kibibytes), None)
