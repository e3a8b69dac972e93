"""A run that an error ended, in any hook, goes on as if there had been none."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import Dataset

from checkpoint_runs import AS_EXPECTED, EVERY_6, MEZO, Killed, Run, Validated, die
from zolightning.checkpoints.replay import Replayed, replay
from zolightning.commands.event_log import event_files

pytestmark = AS_EXPECTED
MakeRun = Callable[..., Run]


class Fails(Callback):
    """Raises where it is told to, once: in one of its hooks, after so many steps."""

    def __init__(self, hook: str, step: int) -> None:
        self.hook, self.step = hook, step

    def at(self, hook: str, trainer: L.Trainer) -> None:
        if (hook, trainer.global_step) == (self.hook, self.step):
            self.hook = ""
            raise RuntimeError("planned")

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.at("batch starts", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.at("batch ends", trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.at("epoch starts", trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.at("epoch ends", trainer)

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.at("validation starts", trainer)


class Noisy(Dataset):
    """Draws random numbers for each row, and asks the callback whether to fail in fetching one."""

    def __init__(self, rows: Any, run: Run, fails: Fails) -> None:
        self.rows, self.run, self.fails = rows, run, fails

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.rows[index]
        if self.run.trainer.training:
            self.fails.at("fetch", self.run.trainer)
        return inputs + torch.rand(()), targets


class Logs(Validated):
    """Counts evaluations, and logs by the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.count += 1
        loss = super().training_step(batch, batch_idx)
        self.log("own", loss, on_step=True, on_epoch=True)
        return loss


def logging_run(make: MakeRun, folder: str, fails: Fails, where: Path, **options: Any) -> Run:
    logger = TensorBoardLogger(where / folder, name="", version="")
    run = make(folder, callbacks=[fails], logger=logger, log_every_n_steps=1, **EVERY_6 | {"max_steps": 15} | options)
    run.module, run.data = Logs(), Noisy(run.data, run, fails)
    return run


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for file in event_files(folder):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            if tag != "epoch":  # beside every metric
                found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


def assert_goes_on(make: MakeRun, where: Path, hook: str, step: int, **options: Any) -> None:
    whole = logging_run(make, "whole", Fails("", 0), where, **options).fit()
    with pytest.raises(RuntimeError, match="planned"):
        logging_run(make, "run", fails := Fails(hook, step), where, **options).fit()
    resumed = logging_run(make, "run", fails, where, **options).fit("last")
    resumed.assert_ends_as(whole)
    assert torch.equal(resumed.module.count, whole.module.count)
    assert logged(where / "run") == logged(where / "whole")


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("batch starts", 3),
        ("batch starts", 7),  # the first of an epoch
        ("batch ends", 6),  # and a validation is due
        ("fetch", 4),
        ("fetch", 6),  # the last of an epoch
        ("fetch", 7),
        ("epoch starts", 7),
        ("epoch ends", 7),
        ("validation starts", 12),
    ],
)
def test_without_a_ledger(make_run: MakeRun, tmp_path: Path, hook: str, step: int) -> None:
    """The last step is saved, and its batch begun again."""
    assert_goes_on(make_run, tmp_path, hook, step)


@pytest.mark.parametrize(("hook", "step"), [("fetch", 9), ("batch starts", 14), ("epoch ends", 7), ("epoch ends", 14)])
def test_with_a_ledger(ledger_run: MakeRun, tmp_path: Path, hook: str, step: int) -> None:
    """The steps since the last validation are taken from it; means of an epoch that ends with them are logged."""
    assert_goes_on(ledger_run, tmp_path, hook, step)


def test_with_a_ledger_and_no_checkpoint_nothing_is_saved(
    ledger_run: MakeRun, make_whole: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    """What callbacks do where a batch begins is not done twice."""
    failed = ledger_run(callbacks=[Fails("batch starts", 4)])
    with caplog.at_level("INFO"), pytest.raises(RuntimeError, match="planned"):
        failed.fit()
    ledger = failed.path.with_name("ledger.bin")
    assert "has step 4, the last complete one. To resume from the ledger: KeepLedger(go_on=" in caplog.text
    assert not failed.path.exists()
    resumed = ledger_run(go_on=True).fit()
    resumed.assert_ends_as(make_whole())
    assert replay(ledger, Validated(), MEZO) == Replayed(20, True)


@pytest.mark.parametrize("options", [{"max_steps": 12}, {"max_steps": -1, "max_epochs": 2, "val_check_interval": 7}])
def test_the_last_validation_of_all_comes_when_the_run_goes_on(
    make_run: MakeRun, make_whole: MakeRun, options: dict[str, Any]
) -> None:
    """There is no step left before it."""
    options = EVERY_6 | options
    whole, failed = make_whole(**options), make_run(**options)
    failed.module.in_validation.at[whole.trainer.global_step, 2] = lambda: int("no number")
    with pytest.raises(ValueError, match="no number"):
        failed.fit()
    resumed = make_run(**options).fit("last")
    assert failed.watch.validated | resumed.watch.validated == whole.watch.validated
    assert failed.watch.batches + resumed.watch.batches == whole.watch.batches
    resumed.assert_ends_as(whole)
    assert not make_run(**options).fit("last").watch.validated, "once"


def test_a_validation_comes_after_a_step_that_could_not_be_logged(make_run: MakeRun, make_whole: MakeRun) -> None:
    """For one because the disk was full."""

    class Logger(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            assert step != 5

    failed = make_run(logger=Logger(), log_every_n_steps=1, **EVERY_6)
    with pytest.raises(AssertionError):
        failed.fit()
    resumed = make_run(**EVERY_6).fit("last")
    assert resumed.watch.validated == make_whole(**EVERY_6).watch.validated


@pytest.mark.parametrize("killed_at", [6, 8])
@pytest.mark.parametrize("fails", [True, False])
def test_a_validation_that_was_due_comes_once(
    make_run: MakeRun, make_whole: MakeRun, fails: bool, killed_at: int
) -> None:
    """It failed, or a signal came before it; also if the run that went on with it is killed and goes on."""
    runs = [make_run(**EVERY_6) for _ in range(3)]
    if fails:
        runs[0].module.in_validation.at[6, 2] = lambda: int("no number")
    else:
        runs[0].module.in_step.at[5] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises((ValueError, SystemExit)):
        runs[0].fit()
    runs[1].module.in_step.at[killed_at] = die
    with pytest.raises(Killed):
        runs[1].fit("last")
    runs[2].fit("last").assert_ends_as(make_whole(**EVERY_6))
    validated = [step for run in runs for step in run.watch.validated]
    assert validated == list(make_whole(**EVERY_6).watch.validated)
