"""Chooses what happens to the momentum when a subspace method draws new subspaces."""

from typing import Any, get_args

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.checks import require_choice
from zolightning.optim.moments import keeps_moments
from zolightning.optim.momentum_transport import Transport
from zolightning.partners import find_callbacks, log_number, subspace_optimizer


class MomentumTransport(Callback):
    """Chooses what happens to the momentum of a subspace method when it draws new subspaces.

    * ``project``: it is projected onto the new subspace (ZO-MOPI, arXiv 2605.09034, equation 11; LOZO-M). This is what
      methods do without this callback.
    * ``reset``: it starts from zero.
    * ``keep``: its coordinates stay, though they stand for other directions now (the released code of ZO-MOPI).

    Adam's second moments are kept, except with ``reset``: they are magnitudes of coordinates, not directions.

    Logs ``zo/momentum_kept``, the share of the momentum's squared norm that is left after the last resampling.

    Args:
        how: "project", "reset" or "keep".

    Raises:
        MisconfigurationException: when training starts, if the optimizer is not a subspace method or keeps no momentum,
            or there is another MomentumTransport.
    """

    def __init__(self, how: Transport = "project") -> None:
        require_choice("how", how, get_args(Transport))
        self.how = how

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizer = subspace_optimizer(trainer, self)
        found = [callback.how for callback in find_callbacks(trainer, MomentumTransport)]
        if len(found) > 1:
            raise MisconfigurationException(
                f"`trainer.callbacks` has {len(found)} MomentumTransport callbacks, with `how` {found}, but the "
                "momentum is transported only once. Keep one."
            )
        for group in optimizer.param_groups:
            if not keeps_moments(group):
                raise MisconfigurationException(
                    f"MomentumTransport has nothing to transport: {type(optimizer).__name__} keeps no momentum here. "
                    "Set its `momentum` above 0, or leave MomentumTransport out."
                )
            group["transport"] = self.how

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        optimizer = subspace_optimizer(trainer, self)
        if optimizer.momentum_kept is not None:
            log_number(pl_module, "zo/momentum_kept", optimizer.momentum_kept)
