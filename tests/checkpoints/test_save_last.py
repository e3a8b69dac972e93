"""The last step is always saved, and a run that goes on from it equals one that was never stopped."""

import errno
import fcntl
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchdata.stateful_dataloader import StatefulDataLoader

from checkpoint_runs import AS_EXPECTED, EVERY_6, Killed, Validated, die
from zolightning.checkpoints.save_last import SaveLast
from zolightning.commands.event_log import event_files
from zolightning.optim import LOZO, MeZO

pytestmark = AS_EXPECTED


_PARTS = (("whole", 9), ("run", 5), ("run", 9))  # folder, and steps


class StopAfter(Callback):
    """What EarlyStopping and Timer do."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 5


@pytest.mark.parametrize(
    "end",
    [
        {"max_steps": 5},
        {"max_steps": 7},
        {"max_steps": -1, "max_epochs": 2},
        {"callbacks": [StopAfter()]},
    ],
    ids=["five steps", "seven steps", "two epochs", "a callback"],
)
@pytest.mark.parametrize("validate", [False, True])
def test_the_end_of_training(make_run: Any, make_whole: Any, end: dict[str, Any], validate: bool) -> None:
    """Whatever ends it, with no validation near, and a longer run goes on from there."""
    often = {"val_check_interval": 100, "check_val_every_n_epoch": None}
    short = make_run(**often | end).fit(validate=validate)
    assert short.saved()["global_step"] == short.trainer.global_step
    goal = {"max_steps": -1, "max_epochs": 4} if "max_epochs" in end else {"max_steps": 20}
    resumed, whole = make_run(**goal, **often).fit("last", validate), make_whole(validate, **goal, **often)
    resumed.assert_ends_as(whole)
    assert short.watch.grads | resumed.watch.grads == whole.watch.grads
    assert len(short.watch.grads) + len(resumed.watch.grads) == len(whole.watch.grads)
    if "callbacks" not in end:  # stopping early validates once more
        assert short.watch.validated | resumed.watch.validated == whole.watch.validated


class Clamped(Validated):
    """Writes to its weights when a batch or a validation is over."""

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            self.net[0].weight.clamp_(-0.3, 0.3)

    def on_validation_end(self) -> None:
        with torch.no_grad():
            self.net[0].bias.clamp_(-0.1, 0.1)


@pytest.mark.parametrize("method", [partial(MeZO, lr=1e-2), partial(LOZO, lr=0.03, rank=2)])
def test_what_the_module_does_at_the_end_of_the_batch_is_saved(make_run: Any, method: Any) -> None:
    whole, stopped, resumed = (make_run(folder, method=method, max_steps=steps) for folder, steps in _PARTS)
    for run in (whole, stopped, resumed):
        run.module = Clamped()
    whole.fit(validate=False), stopped.fit(validate=False)
    assert stopped.saved()["state_dict"]["net.0.weight"].abs().max() <= 0.3
    resumed.fit("last", validate=False).assert_ends_as(whole)
    assert resumed.watch.grads == {step: grads for step, grads in whole.watch.grads.items() if step > 5}
    assert not {"on_train_batch_end", "on_validation_end"} & vars(resumed.module).keys()


def test_what_the_module_does_at_the_end_of_a_validation_is_saved(make_run: Any) -> None:
    often = {"val_check_interval": 5, "check_val_every_n_epoch": None}
    whole, stopped, resumed = (make_run(folder, max_steps=steps, **often) for folder, steps in _PARTS)
    for run in (whole, stopped, resumed):
        run.module = Clamped()
    whole.fit(), stopped.fit()
    assert stopped.saved()["state_dict"]["net.0.bias"].abs().max() <= 0.1
    resumed.fit("last").assert_ends_as(whole)


def test_every_so_many_steps(make_run: Any) -> None:
    run, found = make_run(last={"every_n_train_steps": 3}, max_steps=8), []
    run.module.in_step.at = {step: lambda: found.append(run.saved()["global_step"]) for step in (3, 5, 6)}
    run.fit(validate=False)
    assert found == [3, 3, 6] and run.saved()["global_step"] == 8


def test_every_so_many_minutes(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seconds = make_run(last={"every_n_minutes": 0.5}, max_steps=8), [0.0]
    monkeypatch.setattr("zolightning.checkpoints.save_last.time.monotonic", lambda: seconds[0])
    run.module.in_step.at = {
        2: lambda: seconds.__setitem__(0, 29.0),
        4: lambda: seconds.__setitem__(0, 31.0),
        5: lambda: seconds.__setitem__(0, 32.0),
        6: lambda: found.append(run.saved()["global_step"]),
    }
    found: list[int] = []
    run.fit(validate=False)
    assert found == [5]


def test_the_best_checkpoint_is_that_of_the_whole_run(make_run: Any) -> None:
    options = {"val_check_interval": 3, "check_val_every_n_epoch": None, "method": partial(MeZO, lr=1e-2)}
    folder = make_run().path.parent
    checkpoints = [ModelCheckpoint(folder, "best-{step}", monitor="val/loss", mode="max") for _ in range(2)]
    first = make_run(callbacks=[checkpoints[0]], max_steps=9, **options).fit()
    second = make_run(callbacks=[checkpoints[1]], **options).fit("last")
    validated = first.watch.validated | second.watch.validated
    step = max(validated, key=validated.__getitem__)
    assert step < 9, "the best is to be found in the first part"
    assert checkpoints[1].best_model_path == str(folder / f"best-step={step}.ckpt")
    assert checkpoints[1].current_score == checkpoints[0].current_score == validated[step]
    assert float(checkpoints[1].best_model_score) == validated[step]
    (tested,) = second.trainer.test(
        second.module, StatefulDataLoader(second.data, batch_size=4), ckpt_path="best", verbose=False
    )
    assert tested["test/loss"] == pytest.approx(validated[step], rel=1e-6)


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(make_run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`dirpath` is .*/file/run, where no file can be written: Not a dir"):
        make_run("file/run").fit()


def test_its_folder_is_that_of_the_best_weights(make_run: Any, tmp_path: Path) -> None:
    run = make_run(max_steps=1, callbacks=[Checkpoint(), ModelCheckpoint(tmp_path / "best", save_top_k=0)])
    run.last.dirpath = None
    run.fit()
    assert (tmp_path / "best/last.ckpt").is_file()


def test_another_file_of_the_last_step_is_refused(make_run: Any, tmp_path: Path) -> None:
    """Lightning calls it ``last-v1.ckpt`` in the same folder, and goes on from the newer of the two."""
    with pytest.raises(MisconfigurationException, match="`save_last` of ModelCheckpoint is True, but SaveLast keeps"):
        make_run(callbacks=[ModelCheckpoint(make_run().path.parent, save_last=True)]).fit()
    assert not make_run().path.parent.exists(), "a run that is refused leaves no folder"
    make_run(callbacks=[ModelCheckpoint(tmp_path / "other", save_last=True)], max_steps=1).fit()


def test_another_process_that_trains_in_its_folder_is_refused(make_run: Any) -> None:
    """Two of them would write the same files. The folder is as it was found once a run has ended."""

    def try_too() -> None:
        with pytest.raises(BlockingIOError, match=r"Another process is training and saves its steps in .*/run: wait"):
            make_run().fit()

    def in_step() -> None:
        other = get_context("fork").Process(target=try_too)
        other.start()
        other.join(60)
        assert other.exitcode == 0

    run = make_run(max_steps=3)
    run.module.in_step.at[1] = in_step
    run.fit()
    assert [file.name for file in run.path.parent.iterdir()] == ["last.ckpt"]


def test_on_a_disk_without_locks(ledger_run: Any, make_whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As clusters have; nothing is known there of other processes."""
    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))
    ledger_run(max_steps=4).fit()
    ledger_run().fit("last").assert_ends_as(make_whole())


def test_steps_that_are_taken_again_are_logged_once(make_run: Any, tmp_path: Path) -> None:
    """Those after a checkpoint that no ledger has."""

    def run() -> Any:
        logger = TensorBoardLogger(tmp_path / "run", name="", version="")
        return make_run(last={"every_n_train_steps": 3}, max_steps=8, logger=logger, log_every_n_steps=1)

    killed = run()
    killed.module.in_step.at[5] = die
    with pytest.raises(Killed):
        killed.fit(validate=False)
    assert killed.saved()["global_step"] == 3
    run().fit("last", validate=False)
    events = [EventAccumulator(str(file)).Reload() for file in event_files(tmp_path / "run")]
    steps = [event.step for file in events for event in file.Scalars("train/loss")]
    assert steps == list(range(8))


def test_what_a_killed_process_was_writing_is_removed(make_run: Any) -> None:
    run = make_run(max_steps=1)
    run.path.parent.mkdir()
    (run.path.parent / ".last.ckpt.123.unfinished").write_bytes(b"PK")
    run.fit()
    assert [file.name for file in run.path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "bf16-true"}, ["`trainer.precision` is 'bf16-true'", "'32-true'"]),
        ({"method": partial(LOZO, lr=1e-2)}, ["written by MeZO", "trains with LOZO"]),
        ({"method": None}, ["written by MeZO", "trains with SGD"]),
    ],
)
def test_resuming_another_kind_of_run_is_refused(make_run: Any, options: dict[str, Any], words: list[str]) -> None:
    make_run(max_steps=2).fit()
    with pytest.raises(MisconfigurationException) as raised:
        make_run(**options).fit("last")
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize("option", [{"every_n_train_steps": 0}, {"every_n_minutes": -1.0}])
def test_intervals_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(option))}` must be positive"):
        SaveLast(**option)


def test_a_checkpoint_of_the_last_validation_does_not_ask_for_it_again(make_run: Any, tmp_path: Path) -> None:
    """One that another callback saves, before this one has been told that the validation is over."""

    def run(steps: int) -> Any:
        best = ModelCheckpoint(tmp_path / "best", monitor="val/loss", filename="{step}")
        return make_run(max_steps=steps, callbacks=[best], **EVERY_6)

    run(6).fit()
    resumed = run(8).fit(tmp_path / "best/step=6.ckpt")
    assert sorted(resumed.watch.grads) == [7, 8] and not resumed.watch.validated


def test_a_second_fit_is_saved_though_it_has_as_many_steps(make_run: Any) -> None:
    """By the same callback: it has not saved that step of this fit."""
    first, second = make_run(max_steps=-1, max_epochs=1), make_run(max_steps=-1, max_epochs=1)
    first.fit(validate=False)
    second.trainer.callbacks[second.trainer.callbacks.index(second.last)] = first.last
    second.module.net[0].weight.data.add_(1)
    second.fit(validate=False)
    assert torch.equal(second.saved()["state_dict"]["net.0.weight"], second.module.net[0].weight)
