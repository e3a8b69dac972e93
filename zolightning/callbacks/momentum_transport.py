"""What becomes of the momentum when a subspace method draws new subspaces."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from zolightning.callbacks.subspace_resampling import subspace_optimizer
from zolightning.optim.checks import require_choice
from zolightning.optim.subspace_weights import TRANSPORTS, Transport


class MomentumTransport(Callback):
    """Takes the momentum of a subspace method from one basis to the next.

    * ``project``: to the nearest matrix in the new subspace (ZO-MOPI, arXiv 2605.09034, equation 11; LOZO-M). Without
      this callback methods do that.
    * ``reset``: to zero.
    * ``keep``: its coordinates stay and mean other directions (the released code of ZO-MOPI).

    Adam's second moments are magnitudes of coordinates, not directions: they stay, except under ``reset``.

    Logs ``zo/momentum_kept``, the share of the momentum's squared norm that a resampling left.

    Args:
        how: one of the three.
    """

    def __init__(self, how: Transport = "project") -> None:
        require_choice("how", how, TRANSPORTS)
        self.how = how
        self._logged = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizer = subspace_optimizer(trainer, type(self).__name__)
        for group in optimizer.param_groups:
            group["transport"] = self.how

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        optimizer = subspace_optimizer(trainer, type(self).__name__)
        refresh = optimizer.param_groups[0]["refresh"]
        if refresh != self._logged and optimizer.momentum_kept is not None:
            pl_module.log("zo/momentum_kept", optimizer.momentum_kept)
        self._logged = refresh
