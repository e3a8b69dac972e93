"""When a subspace method draws new subspaces."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.callbacks.activation_bases import ActivationBases
from zolightning.messages import some
from zolightning.optim.subspace import SubspaceOptimizer
from zolightning.partners import add_text, callbacks_of, subspace_optimizer


class SubspaceResampling(Callback):
    """Draws new bases for a subspace method, before the first forward of a step.

    At that moment what has gathered in the cores is added to the weights; what becomes of the momentum is for
    :class:`~zolightning.callbacks.MomentumTransport` to say. Override :meth:`is_due` for a rule of your own.

    Logs ``zo/refresh``, the number of bases after the first, random one. With `bases` also ``zo/input_energy``, the
    mean share of the inputs' energy that they hold, and to TensorBoard that of each matrix, as the text ``bases``.

    Args:
        interval: steps between two draws.
        anchor: how many dominant directions of the momentum stay in the new basis; the rest is drawn. 0 draws all
            of it, independently of the old one: of a momentum of rank r in m rows about r / m of the energy is then
            left. Anchored bases are saved in checkpoints, others are drawn again.
        bases: where factors come from, if not from a draw.

    Raises:
        MisconfigurationException: when training starts, if the optimizer is no subspace method, `anchor` is set for
            one that keeps no momentum, or another callback draws bases too.
    """

    def __init__(self, interval: int = 100, anchor: int = 0, bases: ActivationBases | None = None) -> None:
        if interval < 1:
            raise ValueError(f"`interval` must be at least 1, got {interval}.")
        if anchor < 0:
            raise ValueError(f"`anchor` must not be negative, got {anchor}.")
        self.interval = interval
        self.anchor = anchor
        self.bases = bases

    def is_due(self, trainer: L.Trainer, optimizer: SubspaceOptimizer) -> bool:
        """Whether new bases are drawn before the step that comes next; not asked before the first one."""
        return optimizer.param_groups[0]["step"] % self.interval == 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        callbacks = callbacks_of(trainer)
        intervals = [callback.interval for callback in callbacks if isinstance(callback, SubspaceResampling)]
        if len(intervals) > 1:
            raise MisconfigurationException(
                f"`trainer.callbacks` has {len(intervals)} SubspaceResampling, with `interval` {intervals}: each would "
                "draw bases. Keep one."
            )
        for group in subspace_optimizer(trainer, type(self).__name__).param_groups:
            if self.anchor and not (group["momentum"] or group["betas"]):
                raise MisconfigurationException(
                    f"`anchor` is {self.anchor}, and the method keeps no momentum whose directions could stay. "
                    "Set its `momentum` above 0, or `anchor` to 0."
                )
            if self.anchor > group["rank"]:
                raise MisconfigurationException(
                    f"`anchor` must be at most the method's `rank`, {group['rank']}, got {self.anchor}."
                )
            group["anchor"] = self.anchor

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        optimizer = subspace_optimizer(trainer, type(self).__name__)
        is_due = bool(optimizer.param_groups[0]["step"]) and self.is_due(trainer, optimizer)
        is_first = self.bases is not None and not optimizer.has_given
        if self.bases is not None and (is_first or (is_due and self.bases.refresh)):
            optimizer.fold()  # the network is to run with all of its training
            found = self.bases.find(trainer, pl_module, optimizer, batch)
            if not found.given:
                raise MisconfigurationException(
                    f"`bases` is {type(self.bases).__name__}, and no matrix that trains in a subspace is read by a "
                    f"product whose inputs are finite ({some(found.without) or 'there is none'}). Leave `bases` out."
                )
            optimizer.resample(found.given)
            optimizer.count(found.forward_passes)
            if is_first:
                rank_zero_info(str(found))
            for logger in trainer.loggers:
                # Not by the module's `log`, which repeats it at every step until the epoch ends or the process does.
                logger.log_metrics({"zo/input_energy": found.share}, trainer.global_step)
            add_text(trainer, "bases", f"{found}\n{found.table()}")
        elif is_due:
            optimizer.resample()
        # At every step, so that a resumed run shows it from its first one.
        pl_module.log("zo/refresh", float(optimizer.param_groups[0]["refresh"]))


def require_resampling(optimizer: SubspaceOptimizer, callbacks: Sequence[Callback]) -> None:
    """Raises a MisconfigurationException unless a callback draws new subspaces: without, all of a run is in one."""
    if not any(isinstance(callback, SubspaceResampling) for callback in callbacks):
        raise MisconfigurationException(
            f"{type(optimizer).__name__} needs the callback SubspaceResampling beside ZerothOrder, "
            "`zolightning.callbacks.SubspaceResampling` in `trainer.callbacks`: it says when new subspaces are drawn."
        )
