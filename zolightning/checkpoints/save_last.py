"""Saves the last step of a run: while it trains, at its end, and when it is stopped by a signal or an error."""

import signal
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from shlex import quote
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from zolightning.checkpoints.before_others import BeforeOthers
from zolightning.checkpoints.checkpoint_io import remove_unfinished, require_writable, sole_writer
from zolightning.checkpoints.generators import drawing_again, generators_of_all_ranks, restore_generators
from zolightning.checkpoints.keep_ledger import KeepLedger, ledger_of_run
from zolightning.checkpoints.other_checkpoints import folder_of_others, refuse_two_last_steps
from zolightning.checkpoints.resume import find_files_again
from zolightning.checkpoints.resumed_epoch import ResumedEpoch
from zolightning.checkpoints.run_logs import log_once
from zolightning.checkpoints.same_run import (
    describe,
    leave_out_finders,
    refuse_other_method,
    refuse_other_precision,
    stop_if_ended,
)
from zolightning.checkpoints.stop_signal import StopSignal, ending_at_once, exit_status
from zolightning.checkpoints.unfinished_batch import UnfinishedBatch
from zolightning.evaluation.replaced import followed, replaced
from zolightning.optim.deferred import deferring
from zolightning.partners import callbacks_of, find_callbacks, is_dry_run
from zolightning.rank_zero import rank_zero_info
from zolightning.strategies.ranks import largest_of_ranks, of_all_ranks
from zolightning.training_loop import (
    ends_trial,
    is_accumulating,
    is_at_end_of_batch,
    is_in_trial,
    is_validation_next,
    may_exchange_weights,
    requeue_signal,
    validate,
)

_KEY = "zolightning.SaveLast"


class SaveLast(ModelCheckpoint):
    """Keeps the last step of a run in ``last.ckpt``, so that resuming from it equals not having stopped.

    It is saved when training ends, after every validation, at intervals of steps or minutes, and

    * on SIGTERM and Ctrl-C, after the step that is being taken, including all batches whose gradients it accumulates.
      The process then ends with status 143 or 130, and a message says how to resume. All ranks stop after the same
      step, whichever of them got the signal. A second Ctrl-C ends the process at once, without saving.
    * on an exception, if there is a single rank and the weights are those of the last complete step; a resumed run
      begins the failed batch again. With a :class:`~zolightning.checkpoints.keep_ledger.KeepLedger` nothing is saved:
      the resumed run takes the steps since the last checkpoint from the ledger, and what other callbacks do at the
      start of a batch is then done only once.

    A run that has ended, also through EarlyStopping, does not train further with the same settings when it is resumed;
    what the end of an epoch that `max_steps` cuts short logs is lost if an error or a kill comes in between. If a
    validation was due when the run stopped, a resumed run begins with it. Metrics that are logged per epoch
    (``on_epoch=True``), also those of torchmetrics, continue too, as do the random generators with which loaders
    shuffle. ``Trainer.fit(ckpt_path="last")`` finds the file if `dirpath` is the same in both runs. Use this callback
    in addition to a ModelCheckpoint for the best weights, and together with
    :class:`~zolightning.checkpoints.checkpoint_io.AtomicCheckpointIO`, which makes a kill harmless at any time.

    Args:
        dirpath: folder of ``last.ckpt``; None means that of the run's other ModelCheckpoint, or else the default.
        every_n_train_steps: number of steps between two checkpoints; None saves none at steps.
        every_n_minutes: minutes of training between two checkpoints; None saves none by time.
        how_to_go_on: message for a user whose run was stopped; ``{path}`` is replaced by the path of the checkpoint,
            and ``{folder}`` by the folder of the run's logs, quoted for a shell.

    Raises:
        ValueError: if an interval is not positive; in ``setup``, if `dirpath` cannot be written to.
        BlockingIOError: in ``setup``, if another process trains with a SaveLast of the same `dirpath`.
        MisconfigurationException: before training, if a run is resumed with an optimizer or a precision different from
            its checkpoint's, or another ModelCheckpoint has ``save_last`` set and the same folder.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        every_n_train_steps: int | None = None,
        every_n_minutes: float | None = 10.0,
        how_to_go_on: str = 'trainer.fit(..., ckpt_path="{path}")',
    ) -> None:
        for name, value in (("every_n_train_steps", every_n_train_steps), ("every_n_minutes", every_n_minutes)):
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive, or None for never, got {value}.")
        # With `save_top_k` 0 the hooks of ModelCheckpoint save nothing; those below do.
        super().__init__(dirpath, filename=self.CHECKPOINT_NAME_LAST, save_top_k=0, enable_version_counter=False)
        self.every_n_train_steps = every_n_train_steps
        self.every_n_minutes = every_n_minutes
        self.how_to_go_on = how_to_go_on
        self._signal = StopSignal()
        self._stopping = 0  # number of the signal for which all ranks stop
        self._is_training = False
        self._saved_at = 0.0
        self._validation_due = False  # in the checkpoint that is being saved
        self._resumed: dict[str, Any] = {}
        self._generators_before: list[dict[str, Any]] = []  # the validation
        self._folder = ""  # the folder of the run's logs
        self._first = BeforeOthers(self._save_at_end, self._save_after_error, self._stop_here)
        self._batch = UnfinishedBatch(self._first.metrics)
        self._restore = ExitStack()  # restores the methods of module and strategy, and unlocks the folder

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # This callback comes last, so that the file holds the state of the others; its `_first` comes first, to save
        # after an error before others clean up. (Lightning still iterates over the old list.)
        others = [callback for callback in callbacks_of(trainer) if callback not in (self, self._first)]
        trainer.callbacks = [self._first, *others, self]  # type: ignore[attr-defined]  # as in `callbacks_of`
        if len(trainer.checkpoint_callbacks) == 2:  # this one and that of the best weights
            warnings.filterwarnings("ignore", ".* is called with Trainer configured with multiple `ModelCheckpoint`")
        if self.dirpath is None:
            self.dirpath = folder_of_others(trainer, self)
        super().setup(trainer, pl_module, stage)
        self._folder = trainer.log_dir or trainer.default_root_dir
        self._resumed, self._last_global_step_saved = {}, 0  # not those of an earlier fit
        self._first.epoch = None
        self._restore.close()
        self._restore.enter_context(ending_at_once(trainer))
        if stage != "fit":
            return
        strategy: Any = trainer.strategy
        loop: Any = trainer.fit_loop
        self._batch = UnfinishedBatch(self._first.metrics)
        for owner, name, after in (
            # After the module's own hooks, which follow those of callbacks: what they do to weights (clamps, a
            # teacher's average) would be missing after a resume, because they would not run.
            (pl_module, "on_train_start", self._training_starts),
            (pl_module, "on_train_batch_end", self._batch_ends),
            (pl_module, "on_validation_end", self._validation_ends),
            (loop, "run", self._loop_ends),
        ):
            method = followed(getattr(owner, name), self._unless_trial, trainer, after)
            self._restore.enter_context(replaced(owner, name, method))
        for owner, name, method in (
            # Weights of a subspace method are folded one by one, as a checkpoint is written.
            (strategy, "lightning_module_state_dict", deferring()(strategy.lightning_module_state_dict)),
            (loop.epoch_loop, "advance", self._batch.remembering(trainer, loop.epoch_loop.advance)),
        ):
            self._restore.enter_context(replaced(owner, name, method))
        if not is_dry_run(trainer) and trainer.is_global_zero and "://" not in str(self.dirpath):
            folder = Path(str(self.dirpath))
            require_writable("dirpath", folder)
            self._restore.enter_context(sole_writer(folder))
            remove_unfinished(folder)

    def _unless_trial(self, trainer: L.Trainer, act: Callable[[L.Trainer], None]) -> None:
        """Acts on a step, unless it is one of a finder's, which will be taken back."""
        if not is_in_trial(trainer, self):
            act(trainer)

    # When it saves

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at = time.monotonic()
        self._stopping = 0
        self._is_training = True
        self._signal.listen(requeue_signal(trainer))
        with drawing_again(trainer, self._resumed.get("generators", ())):
            self._first.epoch = epoch = ResumedEpoch(trainer, self._resumed.get("taken_back", False))
        self._first.metrics.restore(trainer, pl_module, self._resumed.get("metrics", ()), is_over=epoch.is_next)
        if self._resumed and not find_callbacks(trainer, KeepLedger):
            log_once(trainer)  # steps after the checkpoint that were already logged, and are taken again

    def _training_starts(self, trainer: L.Trainer) -> None:
        epoch, validation = self._first.epoch, cast(Any, trainer.fit_loop.epoch_loop.val_loop)
        assert epoch is not None
        # Lightning begins a validation in order to skip it, and loaders draw random numbers for that.
        passed_over = isolate_rng()(validation.increment_progress_to_evaluation_end)
        self._restore.enter_context(replaced(validation, "increment_progress_to_evaluation_end", passed_over))
        restore_generators(trainer, self._resumed.get("generators", ()))
        epoch.loaders_begin()
        if self._resumed.get("validation_due"):
            self._generators_before = generators_of_all_ranks(trainer)
            with epoch.not_over():
                validate(trainer)

    def _loop_ends(self, trainer: L.Trainer) -> None:
        if self._first.epoch is None and self._resumed.get("validation_due"):  # with no step left before it
            restore_generators(trainer, self._resumed.get("generators", ()))
            validate(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._stop_here(trainer)

    def _batch_ends(self, trainer: L.Trainer) -> None:
        if is_accumulating(trainer):
            return
        steps, minutes = self.every_n_train_steps, self.every_n_minutes
        is_over = minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        listened = self._signal.number, self._signal.is_requeued
        self._stopping, is_requeued, is_time = largest_of_ranks(trainer, *listened, is_over)
        is_step = steps is not None and trainer.global_step % steps == 0
        # Not at the end of training, when Lightning has counted an unfinished epoch as a finished one.
        is_last_step = trainer.should_stop or trainer.global_step == trainer.max_steps
        validation_due = is_validation_next(trainer)
        if validation_due:
            self._generators_before = generators_of_all_ranks(trainer)
        if self._stopping or ((is_time or is_step or is_last_step) and not validation_due):
            self._save(trainer, validation_due)
        if is_requeued:
            self._signal.requeue()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _has_steps_left(trainer):
            self._stop_here(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        is_told = self._signal.number or self._signal.is_requeued
        if not is_told or trainer.state.fn != TrainerFn.FITTING or not _has_steps_left(trainer):
            return
        # With several ranks, which may have different numbers of batches, or with averages in place of the weights,
        # only at the next training step.
        if trainer.world_size > 1 or may_exchange_weights(trainer) or is_accumulating(trainer):
            return
        if self._signal.number:
            self._stopping = self._signal.number
            self._save(trainer, validation_due=True)
            self._stop_here(trainer)
        if self._signal.is_requeued:
            self._validation_due = True
            self._signal.requeue()
            self._validation_due = False

    def _validation_ends(self, trainer: L.Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not is_accumulating(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end_training()
        (self._stopping,) = largest_of_ranks(trainer, self._signal.number)
        self._stop_here(trainer)

    def _save_at_end(self, trainer: L.Trainer) -> None:
        """Saves the last step before other callbacks end training, which may replace the weights by an average."""
        if self._last_global_step_saved != trainer.global_step:
            self._save(trainer)

    def _save_after_error(self, trainer: L.Trainer, exception: BaseException) -> None:
        """Saves the last complete step after an exception in training, unless a ledger or a file has it already."""
        is_training = self._is_training
        self._end_training()
        if not is_training or not isinstance(exception, Exception) or trainer.world_size > 1:
            return
        if self._last_global_step_saved == trainer.global_step:
            return
        if (ledger := ledger_of_run(trainer)) is not None:
            step = self._batch.last_step(trainer)
            rank_zero_info(f"The ledger has step {step}, the last complete one. {self._advice(ledger)}")
        elif (reason := self._batch.why_not_saved(trainer)) is not None:
            rank_zero_info(f"Nothing is saved: {reason}")
        else:
            self._save(trainer, validation_due=self._batch.end(trainer))
            rank_zero_info(f"{self._where(trainer)} {self._advice()}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore.close()  # Lightning calls no teardown after an exception or an interrupt

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end_training()
        self._restore.close()

    # What it saves

    def _save(self, trainer: L.Trainer, validation_due: bool = False) -> None:
        if not is_dry_run(trainer):
            self._validation_due = validation_due
            self.last_model_path = self.format_checkpoint_name({})
            self._save_checkpoint(trainer, self.last_model_path)
            self._validation_due = False
        self._saved_at = time.monotonic()

    def _where(self, trainer: L.Trainer) -> str:
        return f"Step {trainer.global_step}, the last complete one, is saved in {self.last_model_path}."

    def _advice(self, ledger: Path | None = None) -> str:
        how, path = self.how_to_go_on, self.format_checkpoint_name({})
        if ledger is not None and "{path}" in how and not Path(path).exists():
            return f'To resume from the ledger: KeepLedger(go_on="{ledger}").'
        return f"To resume: {how.format(path=path, folder=quote(str(self._folder)))}"

    def state_dict(self) -> dict[str, Any]:
        return {}  # a run does not inherit the paths of another run's checkpoints

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        is_begun_again = self._validation_due and trainer.validating  # and draws the same random numbers again
        # A resumed run that began with the validation of its last batch has not yet counted that batch.
        is_before = not trainer.validating and is_at_end_of_batch(trainer) and is_validation_next(trainer)
        checkpoint[_KEY] = {
            # Also in a checkpoint of another callback, which is saved before it
            "validation_due": self._validation_due or is_before,
            "taken_back": self._batch.is_counted,
            **describe(trainer),
            "metrics": of_all_ranks(trainer, self._first.metrics.now(trainer)),
            "generators": self._generators_before if is_begun_again else generators_of_all_ranks(trainer),
            **self._batch.put_into(checkpoint),
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not ends_trial(trainer):
            self._resumed = checkpoint.get(_KEY, {})
            refuse_other_precision(trainer, self._resumed)
            find_files_again(trainer, checkpoint)
            leave_out_finders(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        refuse_two_last_steps(trainer, self)
        refuse_other_method(trainer, self._resumed)
        if self._resumed:
            stop_if_ended(trainer)

    # Stopping

    def _end_training(self) -> None:
        self._is_training = False
        self._signal.ignore()

    def _stop_here(self, trainer: L.Trainer) -> None:
        """Ends the process if it was told to, after the last step has been saved."""
        if self._stopping:
            rank_zero_info(f"Stopped by {signal.Signals(self._stopping).name}. {self._where(trainer)} {self._advice()}")
            raise SystemExit(exit_status(trainer, self._stopping))


def _has_steps_left(trainer: L.Trainer) -> bool:
    """Whether a run that resumes from here has a step to take: without one it does not even validate."""
    return trainer.global_step != trainer.max_steps
