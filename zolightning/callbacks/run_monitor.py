"""What a run costs, next to what it achieves."""

import math
import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from zolightning.optim.base import ZerothOrderOptimizer


class RunMonitor(Callback):
    """Logs speed, memory and one sample of the data.

    Scalars, every ``log_every_n_steps`` of the Trainer: ``run/steps_per_second`` (training steps only, validation
    not counted) and ``run/peak_memory_gib`` (of the process; of the device's allocator on CUDA). Once, when
    training starts: the text of one training example under ``prompt`` in TensorBoard, if the data module has
    ``sample_text()``; and after the first step a line that says how much memory the method's state takes.
    """

    def __init__(self) -> None:
        self._started = 0.0
        self._steps = 0
        self._seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._steps, self._seconds = 0, 0.0
        sample_text = getattr(trainer.datamodule, "sample_text", None)
        if sample_text is None:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                # An indented block is shown by TensorBoard as it is, line breaks included.
                text = "\n".join("    " + line for line in sample_text().split("\n"))
                logger.experiment.add_text("prompt", text, trainer.global_step)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._seconds += time.perf_counter() - self._started
        self._steps += 1
        if trainer.global_step == 1:
            self._say_state(trainer)
        # The steps whose values reach the loggers are not multiples of this callback's own count after resuming.
        if trainer._logger_connector.should_update_logs:
            pl_module.log("run/steps_per_second", self._steps / self._seconds)
            pl_module.log("run/peak_memory_gib", peak_memory(pl_module.device) / 2**30)
            self._steps, self._seconds = 0, 0.0

    @staticmethod
    def _say_state(trainer: L.Trainer) -> None:
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, ZerothOrderOptimizer):
                weights = sum(
                    math.prod(optimizer.trainable_shape(p)) * p.element_size() for _, _, p in optimizer.trainable()
                )
                rank_zero_info(
                    f"{type(optimizer).__name__} keeps {optimizer.state_bytes() / 2**20:.1f} MiB of state for "
                    f"{weights / 2**20:.1f} MiB of trainable weights."
                )


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on a CUDA device, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
