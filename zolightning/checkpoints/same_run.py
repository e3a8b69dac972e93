"""A run goes on as the one that was saved: by the same methods, in the same precision, and ended if it had ended."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.partners import find_callbacks


def describe(trainer: L.Trainer) -> dict[str, Any]:
    """What a run that goes on is compared by, to be kept in its checkpoints."""
    return {
        "precision": str(trainer.precision),
        "optimizers": [type(optimizer).__name__ for optimizer in trainer.optimizers],
    }


def refuse_other_precision(trainer: L.Trainer, saved: Mapping[str, Any]) -> None:
    """Raises a MisconfigurationException if the precision is another one than in what a checkpoint has kept."""
    precision = saved.get("precision", str(trainer.precision))
    if precision != str(trainer.precision):
        raise MisconfigurationException(
            f"`trainer.precision` is '{trainer.precision}', and the checkpoint's run has '{precision}'. "
            "Resume with the same one."
        )


def refuse_other_method(trainer: L.Trainer, saved: Mapping[str, Any]) -> None:
    """Raises a MisconfigurationException if the optimizers are of other classes than in what a checkpoint has kept."""
    found = describe(trainer)["optimizers"]
    kept = saved.get("optimizers", found)
    if kept != found:
        raise MisconfigurationException(
            f"The checkpoint was written by {' and '.join(kept)}, and this run trains with "
            f"{' and '.join(found)}. Resume with the same method, or start a new run."
        )


def stop_if_ended(trainer: L.Trainer) -> None:
    """Stops a run that goes on and that EarlyStopping had ended, which Lightning has forgotten."""
    stops = (callback.stopping_reason for callback in find_callbacks(trainer, EarlyStopping))
    if any(reason != EarlyStoppingReason.NOT_STOPPED for reason in stops):
        trainer.should_stop = True
        rank_zero_info("EarlyStopping has ended this run. It trains on without that callback.")
