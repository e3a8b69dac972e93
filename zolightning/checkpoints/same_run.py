"""A resumed run is the run that was saved: with the same methods and precision, and ended if it had ended."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.partners import callbacks_of, find_callbacks
from zolightning.rank_zero import rank_zero_info


def describe(trainer: L.Trainer) -> dict[str, Any]:
    """What a resumed run is compared by, to be kept in its checkpoints."""
    return {
        "precision": str(trainer.precision),
        "optimizers": [type(optimizer).__name__ for optimizer in trainer.optimizers],
    }


def refuse_other_precision(trainer: L.Trainer, saved: Mapping[str, Any]) -> None:
    """Raises a MisconfigurationException if the precision differs from the one that a checkpoint has kept."""
    precision = saved.get("precision", str(trainer.precision))
    if precision != str(trainer.precision):
        raise MisconfigurationException(
            f"`trainer.precision` is '{trainer.precision}', but the checkpoint's run has '{precision}'. "
            "Resume with the same one."
        )


def refuse_other_method(trainer: L.Trainer, saved: Mapping[str, Any]) -> None:
    """Raises a MisconfigurationException if the optimizers' classes differ from those that a checkpoint has kept."""
    found = describe(trainer)["optimizers"]
    kept = saved.get("optimizers", found)
    if kept != found:
        raise MisconfigurationException(
            f"The checkpoint was written by {' and '.join(kept)}, but this run trains with "
            f"{' and '.join(found)}. Resume with the same method, or start a new run."
        )


def stop_if_ended(trainer: L.Trainer) -> None:
    """Stops a resumed run that EarlyStopping had ended, which Lightning has forgotten."""
    stops = (callback.stopping_reason for callback in find_callbacks(trainer, EarlyStopping))
    if any(reason != EarlyStoppingReason.NOT_STOPPED for reason in stops):
        trainer.should_stop = True
        rank_zero_info("EarlyStopping has ended this run. To train it further, resume it without that callback.")


def leave_out_finders(trainer: L.Trainer) -> None:
    """Leaves LearningRateFinder out of a resumed run, whose checkpoint has the rate; refuses BatchSizeFinder.

    After a trial, Lightning would have forgotten the checkpoint's steps and optimizer, and begin with the first step.

    Raises:
        MisconfigurationException: if there is a BatchSizeFinder, because no checkpoint has what it found.
    """
    if find_callbacks(trainer, BatchSizeFinder):
        raise MisconfigurationException(
            "`trainer.callbacks` has a BatchSizeFinder, but the run resumes with the batch size that it had. Give the "
            "data the one that was found, and leave the callback out."
        )
    if find_callbacks(trainer, LearningRateFinder):
        others = [callback for callback in callbacks_of(trainer) if not isinstance(callback, LearningRateFinder)]
        trainer.callbacks = others  # type: ignore[attr-defined]  # as in `callbacks_of`
        rank_zero_info("LearningRateFinder is left out: the run goes on with the learning rate of its checkpoint.")
