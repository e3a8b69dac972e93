"""Measures a learning rate in the first steps of a run, before any weight moves."""

import math
from copy import deepcopy
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.callbacks.replayed_walks import ReplayedWalks, find_scale
from zolightning.checks import require_integer, require_positive
from zolightning.messages import counted
from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.record import StepRecord
from zolightning.partners import add_text, zeroth_order_optimizer
from zolightning.rank_zero import rank_zero_info, rank_zero_warn
from zolightning.scopes.calibration import calibration_batches

_SHARES = (1.0, 0.2)  # rises to look for, as shares of the loss; the second one is for bounded losses


class LearningRateProbe(Callback):
    """Sets the learning rate of a zeroth-order method by the noise that it adds to the loss over the whole run.

    Zeroth-order steps are almost all noise: hardly any of ``-lr g z`` points downhill, and the rest is a random walk.
    After T steps this walk has raised the loss by ``T lr^2 C / 2``, where C is the mean of ``g^2 z' H z`` over steps
    and H the Hessian. Balancing this against D, the decrease of the loss that is possible, gives the best constant
    rate, ``sqrt(2 D / (T C))`` (Ghadimi and Lan, arXiv 1309.5549). Here the rate is chosen so that the rise is `noise`
    times the initial loss.

    The first `num_steps` steps of the run are taken with a learning rate of 0. They measure projected gradients and
    fill the method's momentum and running means. They are then replayed from their records with random signs, forwards
    and backwards, at larger and larger learning rates, until the mean loss of `num_examples` examples has doubled (or,
    if nothing doubles it, has risen by a fifth). A rise that large can be measured although directions differ much. The
    rise of a shorter walk follows from it: it is proportional to the square of the distance, which grows with the root
    of the number of steps.

    This works for any method, with its momentum, normalization and subspaces, because the method itself replays the
    steps. The search starts at the method's ``lr``, and the ratios between parameter groups are kept. A scheduler
    scales the rate that was found, and is taken into account: with one that falls linearly to 0 the noise is that of a
    third of the steps at the highest rate. Weights and state are restored to the bit from a copy in host memory. All
    ranks use the result of the first one. It is kept with the hyperparameters, as ``lr_scale``, so a resumed run does
    not probe again.

    This costs the first steps, and 60 to 100 forwards, which are counted with those of the next step. In TensorBoard
    ``zo/lr`` is 0 at first, and the text ``learning_rate`` says what was found.

    Args:
        num_steps: steps to measure with.
        num_examples: training examples to average the loss over, the first ones of the data.
        noise: rise of the loss by the noise of the whole run, as a share of the initial loss. In short runs of two
            models on two tasks the loss ended lower with the default than with 0.01.
        total_steps: length of the run in steps; None takes the Trainer's.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
        MisconfigurationException: when training starts, if there is no zeroth-order method, or the number of steps is
            not known or too small.

    Example::

        trainer = L.Trainer(max_steps=2000, callbacks=[ZerothOrder(MeZO), LearningRateProbe()])
    """

    def __init__(
        self, num_steps: int = 16, num_examples: int = 64, noise: float = 0.03, total_steps: int | None = None
    ) -> None:
        require_integer("num_steps", num_steps)
        require_integer("num_examples", num_examples)
        if total_steps is not None:
            require_integer("total_steps", total_steps)
        require_positive("noise", noise)
        self.num_steps = num_steps
        self.num_examples = num_examples
        self.noise = noise
        self.total_steps = total_steps
        self._records: list[StepRecord] = []

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises what ``on_train_start`` raises if the run is too short, for the command line."""
        steps = trainer.max_steps if self.total_steps is None else self.total_steps
        if steps >= 0:
            self._refuse_if_short(steps)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizer = zeroth_order_optimizer(trainer, self)
        if "lr_scale" in optimizer.param_groups[0]:  # from a checkpoint
            if self._has_measured(optimizer):  # which was saved after an error in the walks
                self._set_rate(trainer, pl_module, optimizer)
            return
        self._refuse_if_short(self._steps_left(trainer))
        self._records = []
        optimizer.lr_scale = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        optimizer = zeroth_order_optimizer(trainer, self)
        record = optimizer.record
        if optimizer.lr_scale or record is None or not record.projected_grads:
            return
        self._records.append(record)
        if self._has_measured(optimizer):
            self._set_rate(trainer, pl_module, optimizer)

    def _has_measured(self, optimizer: ZerothOrderOptimizer) -> bool:
        return not optimizer.lr_scale and len(self._records) >= self.num_steps

    def _set_rate(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: ZerothOrderOptimizer) -> None:
        batches = calibration_batches(trainer, pl_module, self.num_examples)
        walks = ReplayedWalks(pl_module, optimizer, self._records, batches)
        tries = (find_scale(walks.rises, len(walks), walks.loss, share) for share in _SHARES)
        found = trainer.strategy.broadcast(next(filter(None, tries), None))
        self._records = []  # not before: a run resumed after an error in a walk repeats the walks
        optimizer.count(walks.forwards)
        if found is None:
            optimizer.lr_scale = 1.0
            rank_zero_warn(
                f"LearningRateProbe: `lr` stays {walks.lr[0]:g}, because no steps, however large, raised the loss of "
                f"{self.num_examples} examples, {walks.loss:.4f}, by {_SHARES[-1]:.0%}. Set `lr` yourself."
            )
            return
        steps = int(self._steps_left(trainer))
        share = math.sqrt(self.noise / found.share)  # of the distances
        scale = share * found.scale * math.sqrt(walks.length / _at_full_rate(trainer, steps))
        optimizer.lr_scale = scale
        summary = (
            f"LearningRateProbe: `lr` is {scale * walks.lr[0]:.3g} for {counted(steps, 'step')}, which move "
            f"{share:.2g} times as far as a walk that raises the loss of {self.num_examples} examples, "
            f"{found.loss:.4f}, by {found.share:.0%} (measured near a rise of {found.rise:.4f}, standard error "
            f"{found.error:.4f}; "
            f"{walks.forwards} forwards)."
        )
        rank_zero_info(summary)
        add_text(trainer, "learning_rate", summary)

    def state_dict(self) -> dict[str, Any]:
        return {"records": [asdict(record) for record in self._records]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._records = [StepRecord(**record) for record in state_dict["records"]]

    def _refuse_if_short(self, steps: float) -> None:
        if steps <= self.num_steps:
            raise MisconfigurationException(
                f"`num_steps` of LearningRateProbe is {self.num_steps}, in which nothing moves, but the run has only "
                f"{steps:g} steps. Train for more (`max_steps`), or set `lr` yourself."
            )

    def _steps_left(self, trainer: L.Trainer) -> float:
        total = trainer.estimated_stepping_batches if self.total_steps is None else self.total_steps
        if math.isinf(total):
            raise MisconfigurationException(
                "LearningRateProbe needs to know how many steps the run has. Set `max_steps` of the Trainer, or "
                "`total_steps` of LearningRateProbe."
            )
        return total - trainer.global_step


def _at_full_rate(trainer: L.Trainer, steps: int) -> float:
    """The number of steps at the initial rate that give as much noise as the next `steps` of the run's schedule."""
    if not trainer.lr_scheduler_configs:
        return steps
    scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
    groups = [{name: group[name] for name in group if name != "params"} for group in scheduler.optimizer.param_groups]
    stand_in = SimpleNamespace(param_groups=groups)
    scheduler = deepcopy(scheduler, {id(scheduler.optimizer): stand_in})  # a copy that schedules nothing
    walked = 0.0
    for _ in range(steps):
        walked += (groups[0]["lr"] / groups[0]["initial_lr"]) ** 2
        scheduler.step()
    return walked
