"""A callback that comes first in a Trainer, where :class:`~zolightning.checkpoints.save_last.SaveLast` comes last."""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, WeightAveraging

from zolightning.checkpoints.resumed_epoch import ResumedEpoch, count_last_batch, ends_epoch_when_resumed
from zolightning.checkpoints.running_metrics import RunningMetrics
from zolightning.partners import find_callbacks


class BeforeOthers(Callback):
    """Makes other callbacks see the right epoch and metrics in a resumed run, and clean up only after it is saved.

    A run that was told to stop ends here, before other callbacks end the epoch, if it will end the epoch when resumed.
    """

    def __init__(
        self,
        save_at_end: Callable[[L.Trainer], None],
        save_after_error: Callable[[L.Trainer, BaseException], None],
        stop_here: Callable[[L.Trainer], None],
    ) -> None:
        self.metrics = RunningMetrics()  # of the current epoch
        self.epoch: ResumedEpoch | None = None  # in which the run resumes, once training has started
        self._save_at_end = save_at_end
        self._save_after_error = save_after_error
        self._stop_here = stop_here

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.metrics.batch_ends(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if ends_epoch_when_resumed(trainer):
            self._stop_here(trainer)
        if self.epoch is not None:
            self.epoch.epoch_ends()
        self.metrics.epoch_ends(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save_at_end(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.epoch is None:  # resumed after the last step
            count_last_batch(trainer)
            for averaging in find_callbacks(trainer, WeightAveraging):  # which replace the weights by averages there
                averaging.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._save_after_error(trainer, exception)
