"""Where in its epoch a restored run resumes, which Lightning's loop leaves undefined at the ends of epochs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
from lightning.fabric.utilities.data import _set_sampler_epoch, sized_len
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities import CombinedLoader

from zolightning.rank_zero import rank_zero_warn


class ResumedEpoch:
    """Corrects Lightning's count of epochs, and what its loaders do, in a run that was saved at the end of an epoch.

    * Saved at the last batch: Lightning counts the epoch before training resumes, and then takes another turn for it.
      This turn gets no batch, so that the epoch ends, is counted once, and all loaders begin the next one. Otherwise
      they would continue where they were: beyond ``limit_train_batches``, or with another round of the shorter ones of
      a CombinedLoader.
    * Saved after it, by hooks of the epoch's end: these would be called again, or the state with which the loaders
      shuffle would be forgotten. The next epoch begins here.
    * Loaders made before the run was restored, as happens with a scheduler that asks for
      ``Trainer.estimated_stepping_batches``, would begin with the first batch of the epoch.
    * Samplers that are told the epoch, as those of several ranks are, would resume in the order of the first one:
      Lightning tells them after it has restored the loaders.

    Args:
        trainer: the Trainer, when training starts.
        is_taken_back: whether the run was saved after an error, in the batch that comes next.

    Attributes:
        is_counted: whether the epoch is counted already while its turn is not over.
        is_next: whether the run resumes at the beginning of an epoch.
    """

    def __init__(self, trainer: L.Trainer, is_taken_back: bool) -> None:
        self._loop = loop = cast(Any, trainer.fit_loop)
        progress = loop.epoch_progress
        is_at_last_batch = loop.restarted_mid_epoch and loop.epoch_loop.batch_progress.is_last_batch
        self.is_counted = is_at_last_batch and loop.epoch_loop.restarted_on_train_batch_end
        self._progress = (progress.current, progress.total)
        # Left over by Lightning where an epoch is over, or loaders existed before
        states = loop._combined_loader_states_to_load
        if loop.restarted_mid_epoch or progress.current.processed:
            states = states or loop._combined_loader._state_dicts()
            for loader in loop._combined_loader.flattened:
                _set_sampler_epoch(loader, progress.current.processed)
        if states:
            loop._combined_loader._load_state_dicts(states)
            loop._combined_loader_states_to_load = []
            iter(loop._data_fetcher)
        is_between = not loop.restarted_mid_epoch and progress.current.ready == progress.current.processed
        self.is_next = loop.is_resuming and is_between
        if loop.restarted_mid_epoch and loop.epoch_loop.restarted_on_last and not is_taken_back:
            # Lightning counts this batch for loggers where it skips a validation, and only there
            loop.epoch_loop._batches_that_stepped += not loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        if loop.restarted_mid_epoch:
            _warn_of_loaders_at_their_end(loop._combined_loader, loop.epoch_loop.batch_progress.current.ready)
        if is_at_last_batch:
            loop._data_fetcher.reset()
            loop._data_fetcher.done = True
            loop._last_train_dl_reload_epoch += self.is_counted  # not in this turn
        elif self.is_next:
            self._end_turn()

    def _end_turn(self) -> None:
        loop = self._loop
        if loop.restarted_on_epoch_end:
            loop.epoch_progress.increment_completed()
            loop.reset_restart_stage()
        # The base class's: the loop's own property stays true in a run with `max_steps`
        cast(Any, _Loop.restarting).fset(loop, False)

    def loaders_begin(self) -> None:
        """Makes loaders begin the next epoch, if the last one is over; called once random generators are restored."""
        if self.is_next:
            self._loop.setup_data()  # anew, where `reload_dataloaders_every_n_epochs` says so
            iter(self._loop._data_fetcher)

    @contextmanager
    def not_over(self) -> Iterator[None]:
        """A context in which the epoch is not counted yet."""
        self._end(-self.is_counted)
        yield
        self._end(self.is_counted)

    def epoch_ends(self) -> None:
        """Is told that Lightning is about to count an epoch."""
        self._end(-self.is_counted)
        self._loop._last_train_dl_reload_epoch -= self.is_counted
        self.is_counted = False

    def _end(self, epochs: int) -> None:
        for progress in self._progress:
            progress.processed += epochs
            progress.completed += epochs


def _warn_of_loaders_at_their_end(combined: CombinedLoader, batches: int) -> None:
    """Warns about a loader that was exhausted within an epoch: restored, it begins again."""
    if combined._mode == "max_size" and any((sized_len(loader) or batches) < batches for loader in combined.flattened):
        rank_zero_warn(
            "This run resumes within an epoch of a CombinedLoader of mode 'max_size', in which a shorter loader was "
            "exhausted and begins again: batches differ from those of a run that never stopped. Resume from a "
            "checkpoint of an epoch's end, or use the mode 'max_size_cycle' or 'min_size'."
        )


def ends_epoch_when_resumed(trainer: L.Trainer) -> bool:
    """Whether a run that was saved at the last batch of an epoch, and resumes there, ends that epoch.

    It does if there is more to train, see :class:`ResumedEpoch`.
    """
    epochs = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]  # declared as less
    return trainer.global_step != trainer.max_steps and epochs != trainer.max_epochs


def count_last_batch(trainer: L.Trainer) -> None:
    """Counts the last batch of a run that was restored after it, and its epoch, for what is still logged.

    Lightning does so after it has saved the run, unless the epoch was over.
    """
    loop: Any = trainer.fit_loop
    progress = loop.epoch_progress.current
    loop.epoch_loop._batches_that_stepped += progress.ready != progress.processed
    progress.processed = progress.completed = progress.ready
