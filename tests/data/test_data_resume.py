"""A resumed run goes on with the batches that an uninterrupted run would have seen."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from zolightning.callbacks import SaveLast
from zolightning.data import PromptDataModule

# A resumed run saves beside the checkpoints it came from, or not at all.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:Be aware that when using `ckpt_path`",
    "error:.*your dataloader is not resumable",
)

# 20 training rows: 4 batches of 5 an epoch
STEPS = 11


@pytest.fixture
def fit(
    write_rows: Callable[..., Path],
    make_trainer: Callable[..., L.Trainer],
    make_spectator: Callable[..., L.LightningModule],
) -> Callable[..., list[list[int]]]:
    """Fits a new module with new data and returns the ids of the batches; `save_to` saves at the end."""
    folder = str(write_rows(train=24))

    def fit(
        max_steps: int, ckpt_path: Path | None = None, save_to: Path | None = None, batch_size: int = 5, **kwargs: Any
    ) -> list[list[int]]:
        spectator = make_spectator()
        data = PromptDataModule("sst2", folder, num_validation=4, batch_size=batch_size)
        trainer = make_trainer(max_steps=max_steps, **kwargs)
        try:
            trainer.fit(spectator, datamodule=data, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
        finally:
            if save_to:
                trainer.save_checkpoint(save_to)
        return spectator.train_ids

    return fit


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8, 10])
def test_saved_after_fit(fit: Callable[..., list[list[int]]], tmp_path: Path, stop: int) -> None:
    whole = fit(STEPS)
    assert fit(stop, save_to=tmp_path / "stop.ckpt") == whole[:stop]
    assert fit(STEPS, ckpt_path=tmp_path / "stop.ckpt") == whole[stop:]


@pytest.mark.parametrize("every", [{"every_n_train_steps": 1}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}])
def test_saved_on_the_way(fit: Callable[..., list[list[int]]], tmp_path: Path, every: dict[str, Any]) -> None:
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **every)
    whole = fit(STEPS, callbacks=[checkpoints], enable_checkpointing=True)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 2
    for path in paths:
        assert fit(STEPS, ckpt_path=path) == whole[int(path.stem.removeprefix("step=")) :]


def test_saved_at_a_validation_within_the_epoch(fit: Callable[..., list[list[int]]], tmp_path: Path) -> None:
    validation = {"val_check_interval": 3, "check_val_every_n_epoch": None}
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    whole = fit(STEPS, callbacks=[checkpoints], enable_checkpointing=True, **validation)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert [int(path.stem.removeprefix("step=")) for path in paths] != []
    for path in paths:
        assert fit(STEPS, ckpt_path=path, **validation) == whole[int(path.stem.removeprefix("step=")) :]


class Trip(L.Callback):
    """Fails before the update of one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_zero_grad(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError("tripped")


@pytest.mark.parametrize("step", [2, 4, 6])
def test_saved_after_an_exception_the_interrupted_batch_is_trained(
    fit: Callable[..., list[list[int]]], tmp_path: Path, step: int
) -> None:
    whole = fit(STEPS)
    with pytest.raises(InterruptedError):
        fit(STEPS, save_to=tmp_path / "stop.ckpt", callbacks=[Trip(step)])
    assert fit(STEPS, ckpt_path=tmp_path / "stop.ckpt") == whole[step:]


class Stop(L.Callback):
    """Stops a run by a signal after a step, if one is given, and keeps the epoch of each of its steps."""

    def __init__(self, step: int | None) -> None:
        self.step = step
        self.epochs: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        self.epochs.append(trainer.current_epoch)
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("stops", [[4], [8], [4, 6], [4, 8], [3, 4, 12]])
def test_stopped_at_the_last_batch_of_an_epoch(
    fit: Callable[..., list[list[int]]], tmp_path: Path, stops: list[int]
) -> None:
    """A run of three epochs has three."""
    whole, path, epochs = fit(-1, max_epochs=3), None, []
    for step in [*stops, None]:
        stop = Stop(step)
        try:
            end = fit(-1, path, max_epochs=3, callbacks=[stop, SaveLast(tmp_path)], enable_checkpointing=True)
        except SystemExit:
            path = tmp_path / "last.ckpt"
        epochs += stop.epochs
    assert end == whole[stops[-1] :]
    assert epochs == [0] * 4 + [1] * 4 + [2] * 4


def test_twice_resumed(fit: Callable[..., list[list[int]]], tmp_path: Path) -> None:
    whole = fit(STEPS)
    fit(2, save_to=tmp_path / "2.ckpt")
    assert fit(7, ckpt_path=tmp_path / "2.ckpt", save_to=tmp_path / "7.ckpt") == whole[2:7]
    assert fit(STEPS, ckpt_path=tmp_path / "7.ckpt") == whole[7:]


def test_a_shorter_epoch_goes_on_where_the_last_one_ended(fit: Callable[..., list[list[int]]], tmp_path: Path) -> None:
    whole = fit(STEPS)
    assert fit(STEPS, limit_train_batches=3) == whole
    fit(5, save_to=tmp_path / "5.ckpt", limit_train_batches=3)
    assert fit(STEPS, ckpt_path=tmp_path / "5.ckpt", limit_train_batches=3) == whole[5:]


class Peek(L.Callback):
    """Looks at training batches at every opportunity."""

    def look(self, trainer: L.Trainer, *args: object) -> None:
        for _, _ in zip(range(3), trainer.train_dataloader, strict=False):
            pass

    on_train_start = on_train_epoch_start = on_train_batch_start = on_train_batch_end = on_train_epoch_end = look


def test_a_callback_may_look_at_batches(fit: Callable[..., list[list[int]]], tmp_path: Path) -> None:
    whole = fit(STEPS)
    assert fit(6, save_to=tmp_path / "6.ckpt", callbacks=[Peek()]) == whole[:6]
    assert fit(STEPS, ckpt_path=tmp_path / "6.ckpt", callbacks=[Peek()]) == whole[6:]


def test_other_batches_than_before_are_reported(fit: Callable[..., list[list[int]]], tmp_path: Path) -> None:
    fit(2, save_to=tmp_path / "2.ckpt")
    with pytest.warns(UserWarning, match=r"different training batches \(global batch size 5, now 4\)"):
        fit(3, ckpt_path=tmp_path / "2.ckpt", batch_size=4)
