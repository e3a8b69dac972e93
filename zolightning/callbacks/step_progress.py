"""A progress bar over the steps of a run."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar


class StepProgressBar(TQDMProgressBar):
    """A single progress bar for all steps of a run whose length is given in steps.

    Lightning's own bar starts again in every epoch, and is drawn at every step; this one ten times a second at most.
    """

    _SECONDS = 0.1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._updated = -self._SECONDS

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_train_start()
        if trainer.max_steps >= 0:
            self.train_progress_bar.total = trainer.max_steps
            self.train_progress_bar.initial = self.train_progress_bar.n = trainer.global_step
            self.train_progress_bar.set_description("step")

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.max_steps < 0:
            super().on_train_epoch_start(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        if trainer.max_steps < 0:
            super().on_train_batch_end(trainer, pl_module, *arguments)
        elif self._should_update(trainer.global_step, trainer.max_steps) and self._is_due(trainer):
            self.train_progress_bar.n = trainer.global_step
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def _is_due(self, trainer: L.Trainer) -> bool:
        now = time.monotonic()
        if now - self._updated < self._SECONDS and trainer.global_step < trainer.max_steps:
            return False
        self._updated = now
        return True

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # part of the folder's name, which the run's overview shows
        return metrics
