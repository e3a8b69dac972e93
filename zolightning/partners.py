"""What a callback works with: the method that a Trainer runs, and the callbacks beside it."""

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.optim import SubspaceOptimizer, ZerothOrderOptimizer


def methods_of(trainer: L.Trainer) -> list[ZerothOrderOptimizer]:
    """Those of a Trainer's optimizers that are zeroth-order methods: one, or none."""
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, ZerothOrderOptimizer)]


def zeroth_order_optimizer(trainer: L.Trainer, callback: str) -> ZerothOrderOptimizer:
    """The zeroth-order method that a Trainer runs.

    Raises:
        MisconfigurationException: if it runs none; the message names the `callback` that needs one.
    """
    for method in methods_of(trainer):
        return method
    found = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "no optimizer"
    raise MisconfigurationException(f"{callback} needs a zeroth-order method (the ZerothOrder callback), got {found}.")


def subspace_optimizer(trainer: L.Trainer, callback: str) -> SubspaceOptimizer:
    """The subspace method that a Trainer runs.

    Raises:
        MisconfigurationException: if it runs none; the message names the `callback` that needs one.
    """
    for method in methods_of(trainer):
        if isinstance(method, SubspaceOptimizer):
            return method
    found = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "no optimizer"
    raise MisconfigurationException(
        f"{callback} needs a subspace method (LOZO, GRZO, SubZero, SubspaceMeZO, ZOMuon, ZOMOPI), got {found}. "
        f"Choose one of them, or leave {callback} out."
    )


def callbacks_of(trainer: L.Trainer) -> list[Callback]:
    """The callbacks of a Trainer, all of them."""
    return trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it from outside of the class
