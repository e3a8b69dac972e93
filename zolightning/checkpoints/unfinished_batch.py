"""The batch in which an error ends a run: what is saved then, and how a resumed run begins the batch again."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import lightning as L

from zolightning.checkpoints.generators import generators_of_all_ranks
from zolightning.checkpoints.keep_ledger import ledger_of_run
from zolightning.checkpoints.running_metrics import RunningMetrics
from zolightning.training_loop import (
    is_accumulating,
    is_at_end_of_batch,
    is_between_steps,
    is_in_batch,
    is_validation_next,
    log_batch,
    may_exchange_weights,
    take_back_batch,
    take_back_end_of_epoch,
)


class UnfinishedBatch:
    """Remembers what a batch changes before its step is taken, from before it is fetched.

    A checkpoint that is saved after an error holds this in place of the state at that time: loaders have moved on to
    the batch, and they and the hooks that begin it have drawn random numbers. Nothing is remembered where nothing would
    be saved: with several ranks, or with a ledger.

    Args:
        metrics: what the Trainer knows about metrics.

    Attributes:
        is_taken_back: whether the run, when resumed, fetches and begins the batch again.
        is_counted: whether loggers have counted the batch after which it resumes.
    """

    def __init__(self, metrics: RunningMetrics) -> None:
        self.is_taken_back = self.is_counted = False
        self._metrics = metrics
        self._step = self._processed = 0
        self._before: dict[str, Any] = {}

    def remembering(self, trainer: L.Trainer, advance: Callable[[Any], None]) -> Callable[[Any], None]:
        """What the training loop does with a batch, preceded by remembering."""

        def remember_and_advance(fetcher: Any) -> None:
            self._step, self._processed = trainer.global_step, _processed(trainer)
            if trainer.world_size == 1 and ledger_of_run(trainer) is None:
                loaders: Any = trainer.fit_loop._combined_loader
                self._before = {
                    "metrics": [self._metrics.now(trainer)],
                    "generators": generators_of_all_ranks(trainer),
                    "loaders": deepcopy(loaders._state_dicts()),
                }
            advance(fetcher)

        return remember_and_advance

    def last_step(self, trainer: L.Trainer) -> int:
        """Number of steps that have been taken and logged."""
        return self._step if is_in_batch(trainer) else trainer.global_step

    def why_not_saved(self, trainer: L.Trainer) -> str | None:
        """Why a checkpoint would not hold a state that a run can resume from; None if it would."""
        if trainer.validating and may_exchange_weights(trainer):
            return "during a validation, the weights may be averages of those that are trained."
        if is_accumulating(trainer):
            return "gradients are being accumulated."
        return None if is_between_steps(trainer, self._step) else "some weights may have moved and others not."

    def end(self, trainer: L.Trainer) -> bool:
        """Ends the batch if its step was taken, otherwise makes the run begin it again; returns whether a validation
        comes next. An epoch that was about to end does so when the run is resumed."""
        if is_at_end_of_batch(trainer):  # the run resumes after it, and would not log it
            log_batch(trainer)
        self.is_taken_back = self._processed == _processed(trainer)
        is_open, is_epoch_over = is_in_batch(trainer), take_back_end_of_epoch(trainer)
        if self.is_taken_back:
            take_back_batch(trainer)
        self.is_counted = self.is_taken_back or (is_epoch_over and not is_open)
        is_before_validation = is_open and not self.is_taken_back and not is_epoch_over
        return trainer.validating or (is_before_validation and is_validation_next(trainer))

    def put_into(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Puts the loaders' states into a checkpoint if the batch is begun again; returns metrics and generators."""
        if not self.is_taken_back:
            return {}
        before = dict(self._before)
        if loaders := before.pop("loaders", None):
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = loaders
        return before


def _processed(trainer: L.Trainer) -> int:
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(batches.processed)
