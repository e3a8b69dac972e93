"""A progress bar over the steps of a run."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar


class StepProgressBar(TQDMProgressBar):
    """One bar from the first step of a run to its last, where the run's length is given in steps.

    Lightning's bars begin anew with every epoch, of which a run by steps has any number.
    """

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.max_steps < 0:
            super().on_train_epoch_start(trainer)
            return
        self.train_progress_bar.total = trainer.max_steps
        self.train_progress_bar.initial = 0
        self.train_progress_bar.n = trainer.global_step
        self.train_progress_bar.set_description("step")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        if trainer.max_steps < 0:
            super().on_train_batch_end(trainer, pl_module, *arguments)
        elif self._should_update(trainer.global_step, trainer.max_steps):
            self.train_progress_bar.n = trainer.global_step
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # of the folder, which the first words name
        return metrics
