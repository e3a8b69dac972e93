"""Draws new subspaces for a subspace method, every so many steps."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.callbacks.activation_bases import ActivationBases
from zolightning.checks import require_integer
from zolightning.messages import some
from zolightning.optim.moments import keeps_moments
from zolightning.optim.subspace import SubspaceOptimizer
from zolightning.partners import add_text, find_callbacks, log_number, subspace_optimizer
from zolightning.rank_zero import rank_zero_info


class SubspaceResampling(Callback):
    """Draws new subspaces for a subspace method every `interval` steps, before the first forward of a step.

    The updates in the old subspaces are added to the weights first. What happens to the momentum is the choice of
    :class:`~zolightning.callbacks.MomentumTransport`. Override :meth:`is_due` for a rule of your own.

    Logs ``zo/refresh``, how often new subspaces were drawn. With `bases`, also ``zo/input_energy``, the mean share of
    the inputs' energy that lies in the bases, and to TensorBoard that share for each matrix, as the text ``bases``.

    Args:
        interval: steps between two draws.
        anchor: how many dominant directions of the momentum stay in the new basis, the rest of which is drawn. At 0 the
            new basis is independent of the old one, and about r / m of the energy of a momentum of rank r and m rows
            is kept. Bases with such directions are saved in checkpoints; others need not be.
        bases: takes the bases from activations instead of drawing them.

    Raises:
        MisconfigurationException: when training starts, if the optimizer is not a subspace method, `anchor` is set for
            one that keeps no momentum, or another callback draws bases too.
    """

    def __init__(self, interval: int = 100, anchor: int = 0, bases: ActivationBases | None = None) -> None:
        require_integer("resampling.interval", interval)
        require_integer("anchor", anchor, least=0)
        self.interval = interval
        self.anchor = anchor
        self.bases = bases

    def is_due(self, trainer: L.Trainer, optimizer: SubspaceOptimizer) -> bool:
        """Whether to draw new subspaces before the next step; not called before the first step."""
        return optimizer.param_groups[0]["step"] % self.interval == 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        intervals = [callback.interval for callback in find_callbacks(trainer, SubspaceResampling)]
        if len(intervals) > 1:
            raise MisconfigurationException(
                f"`trainer.callbacks` has {len(intervals)} SubspaceResampling callbacks, with `interval` {intervals}: "
                "each would draw bases. Keep one."
            )
        optimizer = subspace_optimizer(trainer, self)
        self.check_anchor(optimizer)
        for group in optimizer.param_groups:
            group["anchor"] = self.anchor

    def check_anchor(self, optimizer: SubspaceOptimizer) -> None:
        """Raises a MisconfigurationException if the momentum has fewer directions that could stay, or there is none."""
        for group in optimizer.param_groups:
            if self.anchor and not keeps_moments(group):
                raise MisconfigurationException(
                    f"`anchor` is {self.anchor}, but the method keeps no momentum whose directions could stay. "
                    "Set its `momentum` above 0, or `anchor` to 0."
                )
            if self.anchor > group["rank"]:
                raise MisconfigurationException(
                    f"`anchor` must be at most the method's `rank`, {group['rank']}, got {self.anchor}."
                )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        optimizer = subspace_optimizer(trainer, self)
        is_due = bool(optimizer.param_groups[0]["step"]) and self.is_due(trainer, optimizer)
        is_first = self.bases is not None and not optimizer.has_given
        if self.bases is not None and (is_first or (is_due and self.bases.refresh)):
            optimizer.fold()  # so that the network runs with the trained weights
            found = self.bases.find(trainer, pl_module, optimizer, batch)
            if not found.given:
                raise MisconfigurationException(
                    f"`bases` is {type(self.bases).__name__}, but no matrix that trains in a subspace is multiplied by "
                    f"finite inputs ({some(found.without) or 'there is none'}). Leave `bases` out."
                )
            optimizer.resample(found.given)
            optimizer.count(found.forward_passes)
            if is_first:
                rank_zero_info(str(found))
            for logger in trainer.loggers:
                # Not by `pl_module.log`, which would repeat it at every step to the end of the epoch.
                logger.log_metrics({"zo/input_energy": found.share}, trainer.global_step)
            add_text(trainer, "bases", f"{found}\n{found.table()}")
        elif is_due:
            optimizer.resample()
        # At every step, so that a resumed run logs it from its first step on.
        log_number(pl_module, "zo/refresh", optimizer.param_groups[0]["refresh"])


def require_resampling(optimizer: SubspaceOptimizer, callbacks: Sequence[Callback]) -> None:
    """Raises a MisconfigurationException unless a callback draws new subspaces, without which there is only one."""
    if not any(isinstance(callback, SubspaceResampling) for callback in callbacks):
        raise MisconfigurationException(
            f"{type(optimizer).__name__} needs another callback next to ZerothOrder, "
            "`zolightning.callbacks.SubspaceResampling` in `trainer.callbacks`: it decides when to draw new subspaces."
        )
