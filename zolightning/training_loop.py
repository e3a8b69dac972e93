"""Parts of Lightning's training loop that have no public names."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor


def log_again(log: Callable[..., None], name: str, *args: Any, **options: Any) -> None:
    """``log(name, *args, **options)``, with 50 Python calls instead of 1,900 if the hook has logged this name before.

    The calls that are saved check the options again, and copy the stored result to the device that it is on already.

    Args:
        log: the ``log`` of a LightningModule. It is always called if the class overrides it, at the first batch of an
            epoch, for values that are reduced over the epoch, and if the options have changed.
        name: the name that is logged.
        *args: the value, and other arguments; nothing is saved unless the value is a tensor and the only one.
        **options: options of ``log``.
    """
    if getattr(log, "__qualname__", "") != "LightningModule.log" or not _has_logged_again(log, name, *args, **options):
        log(name, *args, **options)


def _has_logged_again(log: Any, name: str, value: Any = None, *args: Any, **options: Any) -> bool:
    trainer, hook = log.__self__._trainer, log.__self__._current_fx_name
    results = None if trainer is None else trainer._results
    if args or not isinstance(value, Tensor) or value.numel() != 1 or results is None:
        return False
    known = results.get(key := f"{hook}.{name}")
    if known is None or known.meta.on_epoch or trainer._logger_connector.should_reset_tensors(hook):
        return False
    is_synced = options.pop("sync_dist", False) and trainer._accelerator_connector.is_distributed
    if is_synced != known.meta.sync.should:
        return False
    if any([getattr(known.meta, option, None) != given for option, given in options.items()]):
        return False
    results.update_metrics(key, value.detach().squeeze(), batch_size=1)
    return True


def validate(trainer: L.Trainer) -> None:
    """Runs the validation that was due when a run was stopped, as the training loop would have."""
    connector = trainer._logger_connector
    loop: Any = trainer.fit_loop.epoch_loop.val_loop
    first_loop_iter = connector._first_loop_iter
    loop.restarting = False
    loop.reset_restart_stage()
    for count in (loop.batch_progress.total, loop.batch_progress.current):
        count.ready = count.started = count.processed = count.completed  # or a later run would go back to finish it
    trainer.validating = True
    loop.run()
    loop._has_run = False  # the training loop takes its first turn for the validation and passes over it
    trainer.training = True
    connector._first_loop_iter = first_loop_iter


def log_nothing(module: L.LightningModule, name: str) -> None:
    """Makes a step log nothing under a name that an earlier step logged: Lightning would log the old value again.

    What is logged by the epoch is left as it is.
    """
    results = module.trainer._results
    known = None if results is None else results.get(f"{module._current_fx_name}.{name}")
    if known is not None and not known.meta.on_epoch:
        known.reset()


def after_restoring(trainer: L.Trainer, call: Callable[[], None]) -> None:
    """Has a fit call a function once a checkpoint has been loaded, if there is one, and before the strategy is set up.

    To be called in a callback's ``setup``, which is not told of a checkpoint. Where a strategy is set up first, so that
    the weights have a place, the checkpoint is loaded after the call.
    """
    strategy = trainer.strategy
    vars(strategy).pop("setup", None)  # left by a fit that failed before it was called
    set_up = strategy.setup

    def call_and_set_up(trainer: L.Trainer) -> None:
        del vars(strategy)["setup"]
        call()
        set_up(trainer)

    vars(strategy)["setup"] = call_and_set_up


def is_in_trial(trainer: L.Trainer, callback: L.Callback) -> bool:
    """Whether a finder of learning rates or batch sizes runs the loop, having set a Trainer's callbacks aside."""
    return callback not in trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it from outside of the class


def ends_trial(trainer: L.Trainer) -> bool:
    """Whether the checkpoint that is being loaded is the one in which a finder kept what its trial would change."""
    return Path(str(trainer.ckpt_path)).name.startswith((".lr_find_", ".scale_batch_size_"))


def is_between_steps(trainer: L.Trainer, step_before_batch: int) -> bool:
    """Whether the weights, and all else that a checkpoint holds, are those after ``trainer.global_step`` steps.

    Args:
        trainer: the Trainer.
        step_before_batch: its ``global_step`` at the start of the batch.
    """
    loop = trainer.fit_loop.epoch_loop
    optimizer_step = (
        loop.automatic_optimization.optim_progress.optimizer.step
        if trainer.lightning_module.automatic_optimization
        else loop.manual_optimization.optim_step_progress
    )
    if optimizer_step.total.ready != optimizer_step.total.completed:
        return False
    batch = loop.batch_progress.total
    is_in_batch = batch.ready != batch.processed  # type: ignore[attr-defined]  # declared as a tracker of less
    return not is_in_batch or trainer.global_step == step_before_batch


def is_in_batch(trainer: L.Trainer) -> bool:
    """Whether a batch is trained on, or callbacks and loggers are being told that it is over."""
    loop = trainer.fit_loop.epoch_loop
    batch = loop.batch_progress.total
    is_logged = trainer.validating or loop._batches_that_stepped >= trainer.global_step
    return not is_logged or batch.started != batch.completed  # type: ignore[attr-defined]  # as above


def is_at_end_of_batch(trainer: L.Trainer) -> bool:
    """Whether callbacks are being told that a batch is over, before a validation that may be due."""
    batch = trainer.fit_loop.epoch_loop.batch_progress.total
    return batch.processed != batch.completed  # type: ignore[attr-defined]  # as above


def log_batch(trainer: L.Trainer) -> None:
    """Logs the metrics of a batch that is over, as the training loop does once callbacks have been told."""
    trainer._logger_connector.update_train_step_metrics()


def is_validation_next(trainer: L.Trainer) -> bool:
    """Whether a Trainer, at the end of a training batch, is about to validate."""
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    return trainer.enable_validation and fetcher is not None and loop.epoch_loop._should_check_val_fx(fetcher)


def is_accumulating(trainer: L.Trainer) -> bool:
    """Whether there are gradients of earlier batches, by backpropagation, which no checkpoint holds."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]  # as above
    is_last = batches == trainer.num_training_batches
    accumulates = trainer.lightning_module.automatic_optimization and batches % trainer.accumulate_grad_batches != 0
    return accumulates and not is_last


def may_exchange_weights(trainer: L.Trainer) -> bool:
    """Whether a validation may run with weights other than the trained ones, as under WeightAveraging.

    Callbacks and modules do so where a validation begins.
    """
    hook = "on_validation_epoch_start"
    callbacks = any(is_overridden(hook, callback, L.Callback) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return callbacks or is_overridden(hook, trainer.lightning_module)


def take_back_batch(trainer: L.Trainer) -> None:
    """Forgets a batch whose step was not taken, so that validations still come after the same numbers of steps."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    for count in (progress.total, progress.current):
        count.ready = count.started = count.processed  # type: ignore[attr-defined]  # as above
    progress.is_last_batch = False


def take_back_end_of_epoch(trainer: L.Trainer) -> bool:
    """Forgets that callbacks and loggers were being told that an epoch is over; returns whether they were."""
    progress: Any = trainer.fit_loop.epoch_progress
    is_ending = bool(progress.total.processed != progress.total.completed)
    for count in (progress.total, progress.current):
        count.processed -= is_ending
    return is_ending


def requeue_signal(trainer: L.Trainer) -> signal.Signals | None:
    """The signal by which SLURM tells a Trainer to save a checkpoint and requeue its job; None without SLURM."""
    environment = trainer._accelerator_connector.cluster_environment
    return (
        environment.requeue_signal if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None
    )
