"""Lowers the learning rate when training stops improving."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from zolightning.checks import require_integer, require_positive
from zolightning.messages import counted
from zolightning.partners import zeroth_order_optimizer
from zolightning.rank_zero import rank_zero_info

_RISEN = 3.0  # standard errors of the difference of two means


class LearningRateControl(Callback):
    """Lowers the learning rate of a zeroth-order method when the training loss rises or stops falling.

    It averages the losses that steps evaluate anyway over intervals of `interval` steps, and compares each interval
    with the best one so far. The rate is multiplied by `factor` if an interval is worse by three standard errors, or if
    `patience` intervals in a row are no better; the search for a best interval then starts over. Unlike torch's
    ``ReduceLROnPlateau`` it needs no metric and no threshold, because the spread of the losses within an interval gives
    the standard error. The rates of a scheduler are multiplied as well.

    The factor is kept with the method's hyperparameters, as ``lr_scale``, and the losses in the callback's state, so a
    resumed run continues bit for bit. Losses are means over all ranks, so all ranks decide alike. ``zo/lr`` shows the
    rate, and so do the records of a ledger.

    Args:
        interval: steps whose losses are averaged.
        patience: intervals without a better mean after which the rate is lowered.
        factor: multiplies the rate.
        min_scale: the rate is not lowered below this share of the first one.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
        MisconfigurationException: when training starts, if there is no zeroth-order method.

    Example::

        callbacks = [ZerothOrder(partial(MeZO, lr=3e-5)), LearningRateControl(interval=100)]
    """

    def __init__(self, interval: int = 50, patience: int = 5, factor: float = 0.5, min_scale: float = 0.01) -> None:
        require_integer("lr_control.interval", interval, least=2)
        require_integer("patience", patience)
        for name, share in {"factor": factor, "min_scale": min_scale}.items():
            require_positive(name, share)
            if share >= 1:
                raise ValueError(f"`{name}` must be below 1, got {share!r}.")
        self.interval = interval
        self.patience = patience
        self.factor = factor
        self.min_scale = min_scale
        self._losses: list[float] = []  # of the current interval
        self._best: tuple[float, float] | None = None  # mean, and its standard error
        self._not_better = 0  # intervals since then
        self._lowest: float | None = None  # scale

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        zeroth_order_optimizer(trainer, self)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        optimizer = zeroth_order_optimizer(trainer, self)
        record, scale = optimizer.record, optimizer.lr_scale
        if record is None or not record.projected_grads or not any(record.lr):  # skipped, or a probe is measuring
            return
        if self._lowest is None:
            self._lowest = self.min_scale * scale
        self._losses.append(record.loss)
        if len(self._losses) < self.interval:
            return
        mean, error = _mean(self._losses)
        self._losses = []
        why = self._why_lower(mean, error)
        if why is None:
            return
        self._best = None
        lowered = max(self.factor * scale, self._lowest)
        if lowered < scale:
            optimizer.lr_scale = lowered
            rank_zero_info(
                f"LearningRateControl: `lr` is multiplied by {lowered / scale:.3g} after step {record.step}, because "
                f"the training loss {why}."
            )

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, f"_{name}") for name in ("losses", "best", "not_better", "lowest")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, f"_{name}", value)

    def _why_lower(self, mean: float, error: float) -> str | None:
        """What is wrong with an interval of this mean loss and standard error; None if nothing is."""
        if self._best is None or mean < self._best[0]:
            self._best, self._not_better = (mean, error), 0
            return None
        best, best_error = self._best
        self._not_better += 1
        if mean - best > _RISEN * math.hypot(error, best_error):
            return f"rose from {best:.4f} to {mean:.4f} ({counted(self.interval, 'step')} each)"
        if self._not_better >= self.patience:
            return f"has not been below {best:.4f} for {self._not_better} times {counted(self.interval, 'step')}"
        return None


def _mean(losses: list[float]) -> tuple[float, float]:
    """The mean, and its standard error."""
    mean, count = sum(losses) / len(losses), len(losses)
    return mean, math.sqrt(sum((loss - mean) ** 2 for loss in losses) / (count - 1) / count)
