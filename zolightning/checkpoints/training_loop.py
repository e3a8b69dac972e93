"""Parts of Lightning's training loop that have no public names."""

import lightning as L


def validate(trainer: L.Trainer) -> None:
    """Runs the validation that was due when a run was stopped, as the training loop would have."""
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop.val_loop
    first_loop_iter = connector._first_loop_iter
    loop.restarting = False
    loop.reset_restart_stage()
    trainer.validating = True
    loop.run()
    loop._has_run = False  # the training loop takes its first turn for the validation and passes over it
    trainer.training = True
    connector._first_loop_iter = first_loop_iter


def count_epoch_once(trainer: L.Trainer) -> None:
    """Corrects a count of Lightning's, which counts an epoch twice that was saved at its last batch and restored."""
    loop = trainer.fit_loop
    is_at_last_batch = loop.epoch_loop.restarted_on_train_batch_end and loop.epoch_loop.batch_progress.is_last_batch
    if loop.restarted_mid_epoch and is_at_last_batch:
        for progress in (loop.epoch_progress.current, loop.epoch_progress.total):
            progress.processed -= 1  # type: ignore[attr-defined]  # declared as a tracker of less
            progress.completed -= 1


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
