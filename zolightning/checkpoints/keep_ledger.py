"""A callback that appends the record of every step to a file."""

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from zolightning.checkpoints.checkpoint_io import LAST, require_writable
from zolightning.checkpoints.find_ledger import NoLedgerError, free_path, ledger_of, ledger_to, whole_records
from zolightning.checkpoints.given_bases import load_bases, save_bases
from zolightning.checkpoints.ledger import Ledger
from zolightning.checkpoints.ledger_header import Header, Unrecorded, describe_run
from zolightning.checkpoints.run_logs import Muted, log_once, not_yet_logged
from zolightning.directions.shards import is_sharded
from zolightning.messages import counted
from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.record import StepRecord
from zolightning.optim.subspace_weights import SubspaceWeights
from zolightning.partners import callbacks_of, find_callbacks, is_dry_run, zeroth_order_optimizer
from zolightning.rank_zero import rank_zero_info, rank_zero_warn
from zolightning.training_loop import ends_trial, is_in_batch
from zolightning.weights_digest import weights_digest

_KEY = "zolightning.KeepLedger"


class KeepLedger(Callback):
    """Appends the record of every step to the file ``ledger.bin``.

    From the ledger, :func:`~zolightning.checkpoints.replay.replay` computes the trained weights without data, and a run
    that was killed can be resumed after its very last step.

    A step takes 45 to 64 bytes with one query. It is written when it is complete and logged, before the next one
    begins, so a killed process loses only the step it was in. Before a checkpoint is saved, the ledger is flushed to
    the disk.

    A run that is resumed from the ``last.ckpt`` of its folder takes the steps after it from the ledger. Batches,
    schedulers and callbacks run as usual, but the loss is not evaluated, loggers get nothing, and the weights are those
    of the killed run. The loss is evaluated nevertheless if it changes the module (metrics, counters) or logs per
    epoch, or if a callback monitors a training metric. When a run is resumed from any other checkpoint, later steps are
    cut off; in another folder it continues a copy of the ledger. The ledger thus always holds the steps that led to the
    current weights. A new run does not overwrite a ledger, but writes ``ledger-v1.bin`` next to it.

    Bases that were given to the method, such as those from activations, are saved next to it, as
    ``ledger-bases-REFRESH.pt``. Other changes that records do not hold end the ledger with a warning: a change of a
    hyperparameter other than the learning rate, of the number of queries, or of the parameters that train. With several
    ranks, the first one writes.

    Args:
        dirpath: folder of the file; None takes that of the run's logs, or else ``default_root_dir``.
        go_on: a ledger to resume the first fit from if it has no checkpoint: for a run that was killed before its first
            checkpoint, or has lost them. Without such a file the run starts from the beginning.

    Attributes:
        path: path of the last fit's ledger; None if there is none, as on all ranks but the first.

    Raises:
        ValueError: in ``setup``, if `dirpath` cannot be written to, or is not local.
        MisconfigurationException: when training starts, if there is no zeroth-order method, or the ledger of `go_on`
            belongs to a run with a different model or settings; naming them.
        BlockingIOError: when training starts, if another process writes the ledger.
        OSError: in a step, if the disk is full; the run can be resumed from its last checkpoint.

    Example::

        trainer = L.Trainer(callbacks=[ZerothOrder(partial(MeZO, lr=1e-6)), KeepLedger(), SaveLast()])
    """

    def __init__(self, dirpath: str | Path | None = None, go_on: str | Path | None = None) -> None:
        self.dirpath = dirpath
        self.go_on = go_on
        self.ledger: Ledger | None = None  # while it is written
        self.path: Path | None = None
        self._folder = Path()
        self._saved: dict[str, Any] | None = None  # the checkpoint's entry about its ledger; {} if it has none
        self._checkpoint: Path | None = None
        self._unrecorded: Unrecorded | None = None
        self._refresh = 0
        self._pending: StepRecord | None = None  # of the current step, to be written when it is over
        self._optimizer: ZerothOrderOptimizer | None = None
        self._hook: RemovableHandle | None = None
        self._muted: Muted | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != TrainerFn.FITTING:
            return
        self._saved = self.path = self._pending = None
        # `log_dir` is a broadcast: on every rank.
        folder = self.dirpath or trainer.log_dir or trainer.default_root_dir
        if "://" in str(folder):
            raise ValueError(
                f"`dirpath` of KeepLedger is {folder}, but a ledger is a file on this machine, to which each step is "
                "appended. Name a local folder, or leave the callback out."
            )
        self._folder = Path(folder)
        if trainer.is_global_zero and not is_dry_run(trainer):
            require_writable("dirpath", self._folder)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if not ends_trial(trainer):
            self._saved = checkpoint.get(_KEY, {})
            self._checkpoint = None if trainer.ckpt_path is None else Path(str(trainer.ckpt_path))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._optimizer = optimizer = zeroth_order_optimizer(trainer, self)
        taken: list[StepRecord] = []
        if not is_dry_run(trainer):
            is_writer = trainer.is_global_zero
            # If weights are sharded, all ranks take part in describing them.
            is_new = self._saved is None and (is_writer or any(map(is_sharded, pl_module.parameters())))
            header = describe_run(optimizer, pl_module) if is_new else None
            taken = self._open(optimizer, header) if is_writer else []
        if self.ledger is not None:
            self.path = self.ledger.path
            self._refresh = optimizer.param_groups[0].get("refresh", 0)
            self._unrecorded = Unrecorded(optimizer)
            self._hook = optimizer.register_step_post_hook(self._note)
        if self._saved is not None or self.go_on is not None:
            is_own = self._checkpoint is not None and self._folder.resolve() in self._checkpoint.resolve().parents
            log_once(trainer, (self._saved or {}).get("not_logged") if is_own else None)
        self._take(trainer, pl_module, optimizer, taken)
        self.go_on = None  # a second fit continues from the first one

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        # A step is over: it is written, and after the last step taken from the ledger the Trainer logs again.
        self._write()
        if self._muted is not None and trainer.optimizers[0].param_groups[0]["step"] >= self._muted.until:
            self._muted.end(trainer)
            self._muted = None

    on_train_epoch_end = on_train_end = on_train_batch_start

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.on_train_batch_start(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.ledger is not None:
            self.ledger.sync()
            # Not in the callback's state, for which Lightning would demand this callback in a validation too.
            checkpoint[_KEY] = {
                "path": str(self.ledger.path.absolute()),
                "checksum": self.ledger.checksum,
                "pending": None if self._pending is None else asdict(self._pending),
                "not_logged": None if self._pending is None else not_yet_logged(trainer),
            }

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._optimizer is None and self._saved:  # resumed after the last step, of a run killed before it was sealed
            self.on_train_start(trainer, pl_module)
        if self._optimizer is None or is_dry_run(trainer):
            return
        parameters = dict(pl_module.named_parameters())
        if self.ledger is not None or any(map(is_sharded, parameters.values())):
            self._optimizer.fold()  # ZerothOrder may do so after this callback
            digest = weights_digest(parameters)
            self._close(digest)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if is_in_batch(trainer):  # its step, if it was taken, is in no curve: the resumed run takes it again
            self._pending = None
        self._end(trainer)  # Lightning calls no teardown after an exception or an interrupt

    # Writing

    def _note(self, optimizer: Optimizer, *_: Any) -> None:
        """A hook after each step of the optimizer: keeps its record until the rest of the step is done."""
        assert isinstance(optimizer, ZerothOrderOptimizer) and self.ledger is not None and self._unrecorded is not None
        record = optimizer.record
        assert record is not None, "a step has just been taken"
        self._write()
        if (what := self._unrecorded.change(optimizer)) is not None:
            self._give_up(f"{what} before step {record.step}, which records do not hold")
            return
        if record.given and record.refresh != self._refresh and isinstance(optimizer, SubspaceWeights):
            save_bases(self.ledger, record.refresh, optimizer)
        self._pending, self._refresh = record, record.refresh

    def _write(self) -> None:
        if self.ledger is not None and self._pending is not None:
            try:
                self.ledger.append(self._pending)
            except ValueError as error:
                self._give_up(str(error))
            self._pending = None

    def _give_up(self, why: str) -> None:
        rank_zero_warn(
            f"This run keeps no ledger from here on: {why}. It cannot be replayed; its checkpoints still work."
        )
        self._close()

    def _end(self, trainer: L.Trainer) -> None:
        with suppress(OSError):  # which has been reported; the run resumes from the step before
            self._write()
        self._close()
        if self._muted is not None:
            self._muted.end(trainer)
            self._muted = None

    def _close(self, digest: str | None = None) -> None:
        if self.ledger is not None:
            self.ledger.close(digest)
            self.ledger = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    # Resuming
    def _open(self, optimizer: ZerothOrderOptimizer, header: Header | None) -> list[StepRecord]:
        """Opens this run's ledger and returns the records of earlier steps that are to be taken from it next.

        `header` is that of a new ledger; None if the run resumes from a checkpoint.
        """
        if header is not None and (self.go_on is None or not Path(self.go_on).is_file()):
            self.ledger = Ledger.create(free_path(self._folder), header)
            self.ledger.go_on(0)
            return []
        steps, is_last = 0, True
        if header is not None:
            found = ledger_of(Path(str(self.go_on)), header)
        else:
            assert self._saved is not None, "only for a run without a checkpoint is there a header"
            try:
                found, steps = ledger_to(self._saved, optimizer.param_groups[0]["step"], self._folder, self._checkpoint)
            except NoLedgerError as error:
                self._give_up(str(error))
                return []
            is_last = self._checkpoint is not None and self._checkpoint.name == LAST
        records = whole_records(found) if is_last else list(found.records(min(steps, len(found))))
        written = min(steps, len(records))  # a kill before the end of the checkpoint's step leaves it out
        is_own = found.path.parent.resolve() == self._folder.resolve()
        # In another folder, the steps after a checkpoint stay with the run that took them.
        taken = records[steps:] if is_last and (is_own or header is not None) else []
        if not is_own:
            found = found.copy(free_path(self._folder), written + len(taken))
        found.go_on(written, keep=len(taken))
        self.ledger = found
        if written < steps and self._saved is not None:
            found.append(StepRecord(**self._saved["pending"]))
        return taken

    def _take(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: ZerothOrderOptimizer, taken: list[StepRecord]
    ) -> None:
        """Makes the optimizer of each rank take its next steps from the first rank's records; nothing is logged."""
        given = {record.refresh for record in taken if record.given and record.refresh != self._refresh}
        bases = {refresh: load_bases(self.ledger, refresh) for refresh in given if self.ledger is not None}
        taken, bases = trainer.strategy.broadcast((taken, bases))
        waits = _waits_for_training(trainer)
        optimizer.expect(taken, evaluate=waits)
        if isinstance(optimizer, SubspaceWeights):
            parameters = dict(module.named_parameters())
            optimizer.recorded = {
                refresh: {parameters[name]: basis for name, basis in of_names.items()}
                for refresh, of_names in bases.items()
            }
        if taken:
            self._muted = Muted(trainer, until=taken[-1].step + 1)
            evaluated = sum(waits or not record.says_all for record in taken)
            forwards = f" ({evaluated} by running the network, for what it keeps or logs)" if evaluated else ""
            steps = counted(len(taken), "step is", "steps are")
            rank_zero_info(f"{steps} restored from the ledger{forwards}, up to step {taken[-1].step + 1}.")


def ledger_of_run(trainer: L.Trainer) -> Path | None:
    """The ledger that a run writes; None if it writes none."""
    return next(
        (callback.path for callback in find_callbacks(trainer, KeepLedger) if callback.ledger is not None), None
    )


def _waits_for_training(trainer: L.Trainer) -> bool:
    """Whether a callback may monitor a metric that training steps log."""
    monitors = (getattr(callback, "monitor", None) for callback in callbacks_of(trainer))
    return any(monitor is not None and not str(monitor).startswith("val") for monitor in monitors)
