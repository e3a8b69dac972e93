"""A run that was stopped, by a signal or an error, goes on as if it had not been."""

import os
import signal
import time
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.trainer.connectors import signal_connector

from checkpoint_runs import AS_EXPECTED, EVERY_6, Killed, die
from zolightning.checkpoints.checkpoint_io import AtomicCheckpointIO
from zolightning.optim import LOZO, MeZO, NonFiniteLossError

pytestmark = AS_EXPECTED
EVERY_EPOCH = {"max_steps": 21}


def kill(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("at", "number", "options"),
    [
        (0, signal.SIGTERM, EVERY_6),
        (4, signal.SIGTERM, EVERY_6 | {"method": partial(LOZO, lr=0.05, rank=2)}),
        (5, signal.SIGTERM, EVERY_6),  # a validation is due after it
        (6, signal.SIGINT, EVERY_6),  # the last of an epoch
        ((6, 0), signal.SIGTERM, EVERY_6),  # in the first batch of a validation
        ((12, 3), signal.SIGINT, EVERY_6),
        ((12, 3), signal.SIGINT, EVERY_6 | {"method": partial(LOZO, lr=0.05, rank=2)}),
        (19, signal.SIGTERM, EVERY_6),  # in the last step
        (3, signal.SIGINT, EVERY_EPOCH),
        (6, signal.SIGTERM, EVERY_EPOCH),  # the last of an epoch, a validation is due
        ((14, 2), signal.SIGTERM, EVERY_EPOCH),
        (4, signal.SIGTERM, EVERY_6 | {"method": None}),  # backpropagation
        ((6, 1), signal.SIGTERM, EVERY_6 | {"method": None}),
    ],
    ids=str,
)
def test_a_run_that_was_told_to_stop_goes_on(
    make_run: Any, make_whole: Any, at: Any, number: int, options: dict[str, Any]
) -> None:
    handlers = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
    stopped = make_run(**options)
    in_validation = isinstance(at, tuple)
    (stopped.module.in_validation if in_validation else stopped.module.in_step).at[at] = partial(kill, number)
    with pytest.raises(SystemExit) as exit_:
        stopped.fit()
    assert exit_.value.code == 128 + number
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == handlers
    step = at[0] if in_validation else at + 1
    assert stopped.saved()["global_step"] == stopped.trainer.global_step == step

    resumed, whole = make_run(**options).fit("last"), make_whole(**options)
    resumed.assert_ends_as(whole)
    assert sorted(stopped.watch.grads) + sorted(resumed.watch.grads) == sorted(whole.watch.grads)
    assert stopped.watch.grads | resumed.watch.grads == whole.watch.grads
    assert stopped.watch.epochs | resumed.watch.epochs == whole.watch.epochs
    assert not stopped.watch.validated.keys() & resumed.watch.validated.keys()
    validated = stopped.watch.validated | resumed.watch.validated
    assert validated == whole.watch.validated
    assert stopped.watch.batches + resumed.watch.batches == whole.watch.batches


@pytest.mark.parametrize("at", [4, 5, (6, 1)], ids=str)
def test_a_job_that_slurm_requeues_goes_on(
    make_run: Any, make_whole: Any, monkeypatch: pytest.MonkeyPatch, at: Any
) -> None:
    """Lightning would save in the middle of a step, or of a validation, and go on in that state."""
    called: list[list[str]] = []

    def requeue(command: list[str]) -> None:
        called.append(command)
        die()

    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr(signal_connector, "call", requeue)

    def slurm(**options: Any) -> Any:
        environment = SLURMEnvironment()
        monkeypatch.setattr(environment, "global_rank", lambda: 0)
        return make_run(**options, plugins=[AtomicCheckpointIO(), environment])

    options = EVERY_6 | {"method": partial(MeZO, lr=0.05, num_queries=2)}
    stopped = slurm(**options)
    in_validation = isinstance(at, tuple)
    (stopped.module.in_validation if in_validation else stopped.module.in_step).at[at] = partial(kill, signal.SIGUSR1)
    with pytest.raises(Killed):
        stopped.fit()
    assert called == [["scontrol", "requeue", "17"]]
    step = at[0] if in_validation else at + 1
    assert stopped.trainer.global_step == step
    resumed, whole = slurm(**options).fit("hpc"), make_whole(**options)
    assert min(resumed.watch.grads) == step + 1
    resumed.assert_ends_as(whole)
    assert stopped.watch.validated | resumed.watch.validated == whole.watch.validated


def test_an_epoch_ends_once(make_run: Any) -> None:
    """Where a run is stopped in its last batch: what ends with it, and what is logged then, is left to the next run."""
    ended: list[int] = []

    class Ends(Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            ended.append(trainer.global_step)

    stopped = make_run(callbacks=[Ends()], **EVERY_EPOCH)
    stopped.module.in_step.at[6] = kill
    with pytest.raises(SystemExit):
        stopped.fit(validate=False)
    make_run(callbacks=[Ends()], **EVERY_EPOCH).fit("last", validate=False)
    assert ended == [7, 14, 21]


@pytest.mark.parametrize("steps", [3, 9])
def test_what_a_stopped_run_says(make_run: Any, steps: int, caplog: pytest.LogCaptureFixture) -> None:
    """Once, also in the last step, which a validation and the end of training save again."""
    run = make_run(last={"how_to_go_on": "again {folder} from {path}"}, max_steps=steps, val_check_interval=3)
    run.module.in_step.at[2] = kill
    with caplog.at_level("INFO"), pytest.raises(SystemExit):
        run.fit()
    (line,) = (record.getMessage() for record in caplog.records if "Stopped" in record.getMessage())
    assert line == (
        f"Stopped by SIGTERM. Step 3, the last complete one, is saved in {run.path}. "
        f"To resume: again {run.trainer.default_root_dir} from {run.path}"
    )


def test_a_signal_after_the_last_batch_of_all_is_not_lost(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be where the commands go on to a test."""
    run = make_run(**EVERY_6, max_steps=18)
    monkeypatch.setattr(
        run.module, "on_validation_end", lambda: kill() if run.trainer.global_step == run.trainer.max_steps else None
    )
    with pytest.raises(SystemExit) as exit_:
        run.fit()
    assert exit_.value.code == 128 + signal.SIGTERM
    assert run.saved()["global_step"] == run.trainer.max_steps


def test_a_signal_before_training_ends_the_run(make_run: Any) -> None:
    """With the status of a signal: Lightning's handler leaves after the batch, with 0."""
    run = make_run(num_sanity_val_steps=2)
    run.module.in_validation.at[0, 0] = kill
    with pytest.raises(SystemExit) as exit_:
        run.fit()
    assert exit_.value.code == 128 + signal.SIGTERM
    assert not run.path.exists()


def test_a_second_interrupt_ends_the_run_at_once(make_run: Any) -> None:
    run = make_run()

    def twice() -> None:
        kill(signal.SIGINT)
        time.sleep(0)
        kill(signal.SIGINT)

    run.module.in_step.at[3] = twice
    with pytest.raises(SystemExit) as exit_:  # Lightning's
        run.fit()
    assert exit_.value.code == 1 and run.trainer.global_step == 3 and not run.path.exists()


@pytest.mark.parametrize("at", [4, 6])
def test_an_error_leaves_the_last_complete_step(make_run: Any, make_whole: Any, at: int) -> None:
    """And the run goes on after it, with the batch that it was at."""
    run = make_run(**EVERY_6)
    run.module.in_step.at[at] = lambda: float("nan")
    with pytest.raises(NonFiniteLossError):
        run.fit()
    assert run.saved()["global_step"] == at
    for name, weight in run.module.state_dict().items():
        assert torch.equal(run.saved()["state_dict"][name], weight)
    resumed, whole = make_run(**EVERY_6).fit("last"), make_whole(**EVERY_6)
    resumed.assert_ends_as(whole)
    assert sorted(run.watch.grads) + sorted(resumed.watch.grads) == sorted(whole.watch.grads)
    assert (run.watch.batches + resumed.watch.batches) == whole.watch.batches
    assert [*run.watch.validated, *resumed.watch.validated] == list(whole.watch.validated)


def test_an_error_in_a_validation(make_run: Any, make_whole: Any) -> None:
    run = make_run(**EVERY_6)
    run.module.in_validation.at[6, 2] = partial(int, "no number")
    with pytest.raises(ValueError, match="no number"):
        run.fit()
    resumed, whole = make_run(**EVERY_6).fit("last"), make_whole(**EVERY_6)
    resumed.assert_ends_as(whole)
    assert run.watch.validated | resumed.watch.validated == whole.watch.validated


def test_a_signal_in_the_last_validation_lets_it_end(make_run: Any, make_whole: Any) -> None:
    """No run that goes on has a step left, after which it could validate."""
    options = {"max_steps": 18, **EVERY_6}
    stopped = make_run(**options)
    stopped.module.in_validation.at[18, 2] = kill
    with pytest.raises(SystemExit):
        stopped.fit()
    assert stopped.watch.validated == make_whole(**options).watch.validated
    make_run(**options).fit("last").assert_ends_as(stopped)


@pytest.mark.parametrize("error", [False, True])
def test_averages_that_a_validation_runs_with_are_not_saved_as_the_weights(make_run: Any, error: bool) -> None:
    def averaging(folder: str) -> Any:
        return make_run(folder, callbacks=[EMAWeightAveraging(decay=0.5)], **EVERY_6)

    whole, stopped, resumed = averaging("whole").fit(), averaging("run"), averaging("run")
    stopped.module.in_validation.at[12, 1] = partial(int, "no number") if error else kill
    with pytest.raises(ValueError if error else SystemExit):
        stopped.fit()
    resumed.fit("last").assert_ends_as(whole)
    assert stopped.watch.grads | resumed.watch.grads == whole.watch.grads


@pytest.mark.parametrize("stop", [kill, die])
def test_nothing_is_saved_while_gradients_are_accumulated(make_run: Any, make_whole: Any, stop: Any) -> None:
    """No checkpoint holds them; here a validation comes after every third batch, and each step is of two."""
    options = {"method": None, "max_steps": 9, "accumulate_grad_batches": 2, **EVERY_6, "val_check_interval": 3}
    stopped = make_run(last={"every_n_minutes": 1e-9}, **options)
    after_first = partial(stopped.module.in_step.at.update, {1: stop})  # in the second batch of the second step
    stopped.module.in_validation.at[1, 0] = after_first
    with pytest.raises((SystemExit, Killed)):
        stopped.fit()
    assert stopped.saved()["global_step"] == (2 if stop is kill else 1)
    make_run(**options).fit("last").assert_ends_as(make_whole(**options))


def test_an_error_within_an_update_saves_nothing(make_run: Any) -> None:
    """Some weights may have moved, others not."""
    run = make_run()
    run.fit()
    before = run.path.stat().st_mtime_ns

    class Broken(MeZO):
        def update(self, record: Any) -> None:
            super().update(record)
            raise RuntimeError("half an update")

    broken = make_run(method=partial(Broken, lr=1e-2))
    with pytest.raises(RuntimeError, match="half an update"):
        broken.fit()
    assert run.path.stat().st_mtime_ns == before
