"""Finds what a callback works with in a Trainer: the method, other callbacks, loggers."""

from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.optim import SubspaceOptimizer, ZerothOrderOptimizer
from zolightning.training_loop import log_again

Kind = TypeVar("Kind", bound=Callback)


def methods_of(trainer: L.Trainer) -> list[ZerothOrderOptimizer]:
    """The zeroth-order methods among a Trainer's optimizers: one, or none."""
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, ZerothOrderOptimizer)]


def zeroth_order_optimizer(trainer: L.Trainer, callback: Callback) -> ZerothOrderOptimizer:
    """The zeroth-order method that a Trainer runs.

    Raises:
        MisconfigurationException: if it runs none; the message names the `callback` that needs one.
    """
    for method in methods_of(trainer):
        return method
    name, found = type(callback).__name__, _optimizer_names(trainer)
    raise MisconfigurationException(f"{name} needs a zeroth-order method (the ZerothOrder callback), got {found}.")


def subspace_optimizer(trainer: L.Trainer, callback: Callback) -> SubspaceOptimizer:
    """The subspace method that a Trainer runs.

    Raises:
        MisconfigurationException: if it runs none; the message names the `callback` that needs one.
    """
    for method in methods_of(trainer):
        if isinstance(method, SubspaceOptimizer):
            return method
    name, found = type(callback).__name__, _optimizer_names(trainer)
    raise MisconfigurationException(
        f"{name} needs a subspace method (LOZO, GRZO, SubZero, SubspaceMeZO, ZOMuon, ZOMOPI), got {found}. "
        f"Choose one of them, or leave {name} out."
    )


def _optimizer_names(trainer: L.Trainer) -> str:
    return ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "no optimizer"


def callbacks_of(trainer: L.Trainer) -> list[Callback]:
    """The callbacks of a Trainer, all of them."""
    return trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it from outside of the class


def find_callbacks(trainer: L.Trainer, kind: type[Kind]) -> list[Kind]:
    """The callbacks of a Trainer that are of a class."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, kind)]


def is_dry_run(trainer: L.Trainer) -> bool:
    """Whether a Trainer has ``fast_dev_run`` set, so that its run leaves no files."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # as above


def log_interval(trainer: L.Trainer) -> int:
    """The number of steps from one that a Trainer logs to the next."""
    return max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]  # as above


def tensorboards(trainer: L.Trainer) -> list[Any]:
    """The loggers of a Trainer that write to TensorBoard; none on ranks other than the first.

    They are recognised by name, because ``pytorch_lightning`` and ``lightning`` have classes of their own.
    """
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger for logger in loggers if any(cls.__name__ == "TensorBoardLogger" for cls in type(logger).__mro__)]


def log_number(module: L.LightningModule, name: str, value: float, **options: Any) -> None:
    """Like ``module.log``, but without waiting for a GPU, to which Lightning would copy a Python number.

    It is logged in float32, whatever the precision of the run.
    """
    log_again(module.log, name, torch.tensor(value, dtype=torch.float32), **options)


def add_text(trainer: L.Trainer, tag: str, text: str) -> None:
    """Shows a text in TensorBoard as it is, line breaks included, where Markdown would join its lines."""
    indented = "\n".join(f"    {line}" for line in text.split("\n"))
    for logger in tensorboards(trainer):
        logger.experiment.add_text(tag, indented, trainer.global_step)
