"""What goes wrong in the middle of a run: it ends with one line, and goes on as if nothing had happened."""

import errno
import os
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger

from checkpoint_runs import AS_EXPECTED, EVERY_6, MEZO, Run, Validated
from zolightning.checkpoints.replay import Replayed, replay
from zolightning.optim import MeZO, StepRecord

pytestmark = AS_EXPECTED
MakeRun = Callable[..., Run]
FAULT_AT = 9  # the third step after a validation and a checkpoint


def no_memory() -> None:
    raise torch.OutOfMemoryError("out of memory")


def fail_in_update(patch: pytest.MonkeyPatch) -> None:
    """Step FAULT_AT moves some of the weights, and not the others."""
    own_update = MeZO.update

    def update(self: MeZO, record: StepRecord) -> None:
        if record.step == FAULT_AT:
            self.param_groups[0]["params"][0].add_(1.0)
            raise RuntimeError("half an update")
        own_update(self, record)

    patch.setattr(MeZO, "update", update)


def refuse_writing(patch: pytest.MonkeyPatch, run: Run, what: str, number: int) -> None:
    """From step FAULT_AT on, `what`, a ledger or checkpoints, cannot be written."""
    error = OSError(number, os.strerror(number))
    own_pwrite, own_save = os.pwrite, torch.save

    def pwrite(file: int, content: bytes, place: int) -> int:
        if run.trainer.global_step > FAULT_AT and what == "ledger":
            own_pwrite(file, content[:20], place)
            raise error
        return own_pwrite(file, content, place)

    def save(content: Any, file: Any) -> None:
        if run.trainer.global_step > FAULT_AT and what == "checkpoint":
            file.write(b"half a checkpoint")
            raise error
        own_save(content, file)

    patch.setattr(os, "pwrite", pwrite)
    patch.setattr(torch, "save", save)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("memory", "out of memory"),
        ("update", "half an update"),
        (("ledger", errno.ENOSPC), r"ledger.bin could not be written at step 9 \(No space left on device\)"),
        (("checkpoint", errno.ENOSPC), r"last.ckpt could not be written \(No space left on device\)"),
        (("checkpoint", errno.EROFS), r"last.ckpt could not be written \(Read-only file system\)"),
    ],
    ids=str,
)
def test_a_run_goes_on_after(
    ledger_run: MakeRun, make_whole: MakeRun, monkeypatch: pytest.MonkeyPatch, fault: Any, words: str
) -> None:
    run = ledger_run(**EVERY_6, last={"every_n_train_steps": 5})
    if fault == "memory":
        run.module.in_step.at[FAULT_AT] = no_memory
    with monkeypatch.context() as patch:
        if fault == "update":
            fail_in_update(patch)
        if isinstance(fault, tuple):
            refuse_writing(patch, run, *fault)
        with pytest.raises((RuntimeError, OSError), match=words):
            run.fit()
    if fault == "memory":
        replayed = Validated()
        replay(run.path.with_name("ledger.bin"), replayed, MEZO)
        for weight, other in zip(run.module.parameters(), replayed.parameters(), strict=True):
            assert torch.equal(weight, other)
    resumed = ledger_run(**EVERY_6).fit("last")
    resumed.assert_ends_as(make_whole(**EVERY_6))
    assert replay(resumed.keep.path, Validated(), MEZO) == Replayed(20, True)
    assert min(resumed.watch.grads) > 5, "it did not begin anew"
    assert not list(run.path.parent.glob(".*")), "no half a file is left"


def test_a_step_that_cannot_be_logged_is_taken_again(
    ledger_run: MakeRun, make_whole: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    """For one when the disk is full: it would be missing in the curves."""
    logged: list[int] = []

    class Logger(DummyLogger):
        is_full = True

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            if self.is_full and step == FAULT_AT:
                raise OSError(errno.ENOSPC, "no space")
            logged.extend([step] * ("train/loss" in metrics))

    options = EVERY_6 | {"logger": Logger(), "log_every_n_steps": 1}
    with caplog.at_level("INFO"), pytest.raises(OSError, match="no space"):
        ledger_run(**options).fit()
    assert f"The ledger has step {FAULT_AT}, the last complete one." in caplog.text
    options["logger"].is_full = False
    ledger_run(**options).fit("last").assert_ends_as(make_whole(**EVERY_6))
    assert logged == list(range(20))


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ("ledger_run", f"The ledger has step {FAULT_AT - 1}, the last complete one."),  # and the run takes it again
        ("make_run", f"Step {FAULT_AT}, the last complete one, is saved in "),
    ],
)
def test_a_step_at_whose_end_a_callback_fails_is_logged_once(
    request: pytest.FixtureRequest, make_whole: MakeRun, caplog: pytest.LogCaptureFixture, runs: str, said: str
) -> None:
    make_run, logged = request.getfixturevalue(runs), []

    class Logger(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            if "train/loss" in metrics:
                logged.append(step)

    class Fails(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == FAULT_AT:
                raise RuntimeError("planned")

    options = EVERY_6 | {"logger": Logger(), "log_every_n_steps": 1}
    with caplog.at_level("INFO"), pytest.raises(RuntimeError, match="planned"):
        make_run(**options, callbacks=[Fails()]).fit()
    assert said in caplog.text
    make_run(**options).fit("last").assert_ends_as(make_whole(**EVERY_6))
    assert logged == list(range(20))
