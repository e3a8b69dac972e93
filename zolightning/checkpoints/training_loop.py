"""Where a training loop is, and what it forgets of a run that goes on: Lightning has no public names for that."""

import lightning as L


def validate(trainer: L.Trainer) -> None:
    """The validation that was due when the run stopped, as the training loop would have run it."""
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
    """Lightning counts an epoch that was saved at its last batch when it restores it, and again when it ends it."""
    loop = trainer.fit_loop
    is_at_last_batch = loop.epoch_loop.restarted_on_train_batch_end and loop.epoch_loop.batch_progress.is_last_batch
    if loop.restarted_mid_epoch and is_at_last_batch:
        for progress in (loop.epoch_progress.current, loop.epoch_progress.total):
            progress.processed -= 1  # type: ignore[attr-defined]  # declared as a tracker of less
            progress.completed -= 1


def is_between_steps(trainer: L.Trainer, step_before_batch: int) -> bool:
    """Whether the weights are those after ``trainer.global_step`` steps, and so is all else that is saved.

    Args:
        trainer: that trains.
        step_before_batch: its ``global_step`` when the batch began.
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
