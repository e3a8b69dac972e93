"""What is logged by the epoch, and what callbacks find at its end, is that of the whole epoch after a resume in it."""

import os
import signal
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError

from checkpoint_runs import AS_EXPECTED, Killed, Run, Validated, die

pytestmark = AS_EXPECTED
EPOCH = 7  # batches


class Averaging(Validated):
    """Logs in every way that an epoch sums up; one value in its first two batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.error = MeanAbsoluteError()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("mean", loss, on_step=True, on_epoch=True)
        self.log("last", loss)
        for reduced in ("min", "max", "sum"):
            self.log(reduced, loss, on_step=False, on_epoch=True, reduce_fx=reduced)
        self.error(self.net(batch[0]), batch[1])
        self.log("error", self.error, on_step=False, on_epoch=True)
        if batch_idx < 2:
            self.log("early", loss, on_step=False, on_epoch=True)
        return loss


class Epochs(Callback):
    """The metrics at the end of each epoch, once all are there; it is asked for the last ones by EarlyStopping too."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        module.log("step", float(trainer.global_step), on_step=False, on_epoch=True)

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._note(trainer)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._note(trainer)

    def _note(self, trainer: L.Trainer) -> None:
        if trainer.global_step % EPOCH == 0 and trainer.global_step:
            metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
            self.found[trainer.global_step] = metrics


def make(make_run: Any, folder: str, **options: Any) -> Run:
    epochs, stopping = Epochs(), EarlyStopping("last", patience=10, check_on_train_epoch_end=True)
    run = make_run(folder, callbacks=[epochs, stopping], **{"max_steps": 3 * EPOCH} | options)
    run.module, run.epochs = Averaging(), epochs
    return run


@pytest.mark.parametrize(("kill", "every"), [(9, 1), (12, 3), (13, 13), (15, 7)])  # the beginning, later, at the end
@pytest.mark.parametrize("runs", ["make_run", "ledger_run"])
def test_of_the_whole_epoch(request: pytest.FixtureRequest, runs: str, kill: int, every: int) -> None:
    make_run = request.getfixturevalue(runs)
    options = {"last": {"every_n_train_steps": every}}
    whole = make(make_run, "whole", **options).fit(validate=False)
    assert whole.epochs.found.keys() == {7, 14, 21}
    assert whole.epochs.found[14].keys() >= {"mean_epoch", "last", "min", "max", "sum", "error", "early"}
    for at, path in ((kill, None), (kill + 1, "last")):
        killed = make(make_run, "run", **options)
        killed.module.in_step.at[at] = die
        with pytest.raises(Killed):
            killed.fit(path, validate=False)
    resumed = make(make_run, "run", **options).fit("last", validate=False)
    resumed.assert_ends_as(whole)
    later = {step: metrics for step, metrics in whole.epochs.found.items() if step > kill // EPOCH * EPOCH}
    assert {step: resumed.epochs.found[step] for step in later} == later


@pytest.mark.gpu
def test_of_the_whole_epoch_are_on_a_gpu_where_ranks_reduce_them(make_run: Any) -> None:
    options: dict[str, Any] = {"accelerator": "gpu", "devices": 1, "last": {"every_n_train_steps": 3}}
    killed = make(make_run, "run", **options)
    killed.module.in_step.at[12] = die
    with pytest.raises(Killed):
        killed.fit(validate=False)
    resumed = make(make_run, "run", **options)
    with patch.object(resumed.module, "log", wraps=resumed.module.log) as log:
        resumed.fit("last", validate=False)
    assert {call.args[1].device.type for call in log.mock_calls if call.args[0] == "early"} == {"cuda"}


def test_of_the_next_epoch_alone_where_a_loader_begins_it(make_run: Any) -> None:
    """A plain loader, which begins anew where the run was stopped in the last batch of an epoch."""
    whole, stopped, resumed = (make(make_run, folder) for folder in ("whole", "run", "run"))
    stopped.module.in_step.at[EPOCH - 1] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    loader = DataLoader(whole.data, batch_size=4)
    whole.trainer.fit(whole.module, loader)
    with pytest.raises(SystemExit):
        stopped.trainer.fit(stopped.module, loader)
    resumed.trainer.fit(resumed.module, loader, ckpt_path="last")
    found = stopped.epochs.found | resumed.epochs.found
    assert found.keys() == whole.epochs.found.keys() and found[2 * EPOCH]["sum"] > 0
    for name in ("mean_epoch", "min", "max", "sum", "error", "early"):
        assert [of_epoch[name] for of_epoch in found.values()] == pytest.approx(
            [of_epoch[name] for of_epoch in whole.epochs.found.values()]
        ), name


def test_a_batch_that_failed_is_not_in_the_sums(make_run: Any) -> None:
    def fail(module: Averaging, batch: Any, batch_idx: int) -> Tensor:
        loss = Averaging.training_step(module, batch, batch_idx)
        if module.trainer.global_step == 9:
            raise OSError("planned")
        return loss

    failed, stopped = make(make_run, "failed"), make(make_run, "stopped", max_steps=9).fit(validate=False)
    failed.module.training_step = fail.__get__(failed.module)
    with pytest.raises(OSError, match="planned"):
        failed.fit(validate=False)
    sums, expected = (run.saved()["zolightning.SaveLast"]["metrics"][0]["epoch"] for run in (failed, stopped))
    assert sums == expected and sums["training_step.early"]["updates"] == 2


def test_the_last_values_are_there_before_the_next_ones(make_run: Any) -> None:
    """Of a validation, for one: a ModelCheckpoint between two of them monitors it."""
    seen: list[Tensor] = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append(trainer.callback_metrics.get("val/loss", torch.nan))

    options = {"val_check_interval": 6, "check_val_every_n_epoch": None, "max_steps": 9}
    make_run(**options | {"max_steps": 8}).fit()
    first = make_run("other", callbacks=[Looks()], **options).fit()
    expected = seen[-1]
    seen.clear()
    make_run(callbacks=[Looks()], **options).fit("last")
    assert len(seen) == 1 and torch.equal(seen[0], expected) and first.trainer.global_step == 9
