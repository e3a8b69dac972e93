"""Block coordinate descent with any zeroth-order method."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from zolightning.blocks.orders import Cyclic, Order
from zolightning.blocks.partition import Others, find_blocks
from zolightning.blocks.schedule import BlockSchedule, require_same_settings, require_schedule, schedule_settings
from zolightning.blocks.timeline import Timeline
from zolightning.checks import require_choice, require_patterns
from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.blocks import LeftState
from zolightning.partners import log_interval, log_number, tensorboards, zeroth_order_optimizer
from zolightning.rank_zero import rank_zero_info
from zolightning.scopes.scope import scopes_of


class BlockCoordinateDescent(Callback):
    """Trains a few blocks of the parameters at a time, and switches to other blocks every `interval` steps.

    A scope chooses the parameters that train, and this callback divides them into blocks. Layers below the lowest
    active block run only once per step (:mod:`zolightning.evaluation.shared_prefix`), so leave
    ``evaluations_per_forward`` at 1. Learning rates differ from those of training everything, because fewer parameters
    move at a time: rates of about ten times MeZO's were published (B-PDF).

    MeZO-BCD (arXiv 2501.19099) is ``RandomPermutation`` with an interval of 100 under MeZO, LeZO is ``Uniform`` with an
    interval of 1, and B-PDF and FOCUS are ``Cyclic`` and ``Bandit`` under HiZOO.

    To TensorBoard it writes the picture ``blocks/active`` at validations and at the end: when each block moved, its
    share of all steps, and its probability of being drawn next. It logs ``blocks/score/*`` and ``blocks/probability/*``
    if the order has them, and ``zo/prefix_share``, the share of all layer runs that were skipped because an earlier
    evaluation had already computed them: the mean over the last ``log_every_n_steps`` steps that were evaluated.

    Args:
        order: how the next blocks are chosen: ``Cyclic()`` (the default), ``RandomPermutation()``, ``Uniform()``,
            ``WeightNorm()``, ``GaussSouthwellSweep()``, ``Bandit()`` or ``AdaLeZO()`` (:mod:`zolightning.blocks`).
        interval: steps until other blocks move.
        blocks_per_step: number of blocks that move at a time.
        patterns: regular expressions, one for each block; without them each layer is a block.
        others: what happens to parameters outside the layers, or that match no pattern. "blocks" makes them blocks too,
            ``embeddings`` and ``head``. "always" moves them in every step, so that with embeddings among them no layer
            can run just once per step. "never" freezes them.
        left_state: what happens to the state of a block that becomes inactive. "reset" drops it, so that the method's
            memory is that of the active blocks; half-precision weights are then rounded stochastically, which loses no
            small updates on average but adds some noise. "keep" keeps it for the next time.
        layers_name: where the layers are, see :func:`~zolightning.layers.find_layers`; found by structure if not given.

    Raises:
        MisconfigurationException: when training starts, if there is no zeroth-order method, or the parameters that
            train do not make the blocks asked for; naming the argument.
    """

    def __init__(
        self,
        order: Order | None = None,
        interval: int = 100,
        blocks_per_step: int = 1,
        patterns: Sequence[str] | None = None,
        others: Others = "blocks",
        left_state: LeftState = "reset",
        layers_name: str | None = None,
    ) -> None:
        require_schedule(interval, blocks_per_step, left_state)
        if patterns is not None:
            require_patterns(patterns)
        require_choice("others", others, get_args(Others))
        self.order = Cyclic() if order is None else order
        self.interval = interval
        self.blocks_per_step = blocks_per_step
        self.patterns = patterns
        self.others: Others = others
        self.left_state: LeftState = left_state
        self.layers_name = layers_name
        self.schedule: BlockSchedule | None = None
        self.timeline = Timeline(0)
        self._restored: dict[str, Any] | None = None
        self._evaluates = True  # the current step; a resumed run may take it from a ledger instead
        self._shares: deque[float] = deque()  # share of the runs of layers saved in each of the latest steps

    def describe(self) -> str:
        """The number of blocks and their order, in a few words."""
        count = f"{self.blocks_per_step} of " if self.blocks_per_step > 1 else ""
        number = "" if self.schedule is None else f"{len(self.schedule.blocks)} "
        steps = "step" if self.interval == 1 else f"{self.interval} steps"
        return f"{count}{number}blocks by {type(self.order).__name__}, switched every {steps}"

    @property
    def never(self) -> Sequence[nn.Parameter]:
        """The parameters that are frozen by ``others="never"``."""
        return () if self.schedule is None else self.schedule.blocks.never

    def largest(self, optimizer: ZerothOrderOptimizer) -> set[nn.Parameter]:
        """The parameters that train and move together when the largest blocks are active."""
        if self.schedule is None:
            return {parameter for _, _, parameter in optimizer.trainable()}
        blocks = self.schedule.blocks
        by_size = sorted(blocks.parameters.values(), key=lambda block: sum(p.numel() for p in block))
        resting = {p for block in [*by_size[: -self.blocks_per_step], blocks.never] for p in block}
        return {parameter for _, _, parameter in optimizer.trainable() if parameter not in resting}

    def setup(self, *_: Any, **__: Any) -> None:
        self._restored = None  # of a checkpoint that was only validated or tested

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises what ``on_fit_start`` raises, for the command line, unless a scope has yet to choose what trains."""
        if not scopes_of(trainer):
            self._make_schedule(pl_module, [p for p in pl_module.parameters() if p.requires_grad])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizer = zeroth_order_optimizer(trainer, self)
        self.schedule = self._make_schedule(pl_module, [parameter for _, _, parameter in optimizer.trainable()])
        blocks = self.schedule.blocks
        self.timeline = Timeline(len(blocks), start=optimizer.param_groups[0]["step"])
        if self._restored is not None:
            self.timeline.load_state_dict(self._restored["timeline"])
        self.schedule.attach(optimizer)
        self._shares = deque(maxlen=log_interval(trainer))
        sizes = [sum(parameter.numel() for parameter in block) for block in blocks.parameters.values()]
        rank_zero_info(f"BlockCoordinateDescent: {self.describe()}; {min(sizes):,} to {max(sizes):,} parameters each.")

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._evaluates = not zeroth_order_optimizer(trainer, self).is_replaying

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        optimizer, schedule = zeroth_order_optimizer(trainer, self), self.schedule
        assert schedule is not None, "`on_fit_start` makes it"
        record = optimizer.record
        if record is None:
            return
        self.timeline.add(record.blocks)
        if self._evaluates and optimizer.evaluator.prefix.layers:
            self._shares.append(optimizer.evaluator.prefix.share)
            log_number(pl_module, "zo/prefix_share", sum(self._shares) / len(self._shares))
        if record.step % self.interval == 0:
            self._log_scores(trainer, record.step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._draw(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._draw(trainer)

    def teardown(self, *_: Any, **__: Any) -> None:
        if self.schedule is not None:
            self.schedule.detach()

    on_exception = teardown  # Lightning calls no teardown after an exception or an interrupt

    def state_dict(self) -> dict[str, Any]:
        if self.schedule is None:
            return {}
        return {"schedule": self.schedule.state_dict(), "timeline": self.timeline.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.check_resume(checkpoint.get("callbacks", {}))

    def check_resume(self, states: Mapping[str, Any]) -> None:
        """Refuses to resume a run if the saved states of its callbacks show different blocks; names what differs."""
        if not states.get(self.state_key):
            raise MisconfigurationException(
                "`ckpt_path` is a checkpoint of a run without BlockCoordinateDescent, in which all parameters moved. "
                "Resume it without BlockCoordinateDescent, or start a new run from its weights."
            )
        own = schedule_settings(self.order, self.interval, self.blocks_per_step, self.left_state)
        try:
            require_same_settings(own, states[self.state_key]["schedule"]["settings"])
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error

    def _make_schedule(self, pl_module: L.LightningModule, trainable: Sequence[nn.Parameter]) -> BlockSchedule:
        try:
            blocks = find_blocks(pl_module, trainable, self.patterns, self.others, self.layers_name)
            schedule = BlockSchedule(blocks, self.order, self.interval, self.blocks_per_step, self.left_state)
            if self._restored is not None:
                schedule.load_state_dict(self._restored["schedule"])
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        return schedule

    def _log_scores(self, trainer: L.Trainer, step: int) -> None:
        found = {"score": self.order.scores, "probability": getattr(self.order, "probabilities", [])}
        schedule = self.schedule
        assert schedule is not None
        for kind, values in found.items():
            named = {f"blocks/{kind}/{name}": value for name, value in zip(schedule.blocks.names, values, strict=False)}
            for logger in trainer.loggers if named else ():
                logger.log_metrics(named, step)

    def _draw(self, trainer: L.Trainer) -> None:
        if self.schedule is None or not self.timeline.steps:
            return
        for logger in tensorboards(trainer):
            figure = self.timeline.figure(self.schedule.blocks.names, getattr(self.order, "probabilities", ()))
            logger.experiment.add_figure("blocks/active", figure, trainer.global_step)
