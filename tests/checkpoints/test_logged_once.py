"""A step at whose end a run was killed is in its curves once when the run has gone on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpoint_runs import AS_EXPECTED, Killed, Run, die
from zolightning.checkpoints.ledger import Ledger
from zolightning.commands.event_log import event_files
from zolightning.optim import StepRecord

pytestmark = AS_EXPECTED
MakeRun = Callable[..., Run]


def test_a_step_that_was_saved_and_not_logged_is_logged_when_the_run_goes_on(
    ledger_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning logs a step after the last hook in which it can be saved."""

    def tensorboard() -> TensorBoardLogger:
        return TensorBoardLogger(tmp_path / "run", name="", version="")

    options: dict[str, Any] = {"max_steps": 8, "log_every_n_steps": 1, "last": {"every_n_train_steps": 5}}
    logger = tensorboard()
    own = logger.log_metrics
    monkeypatch.setattr(logger, "log_metrics", lambda metrics, step: die() if step == 4 else own(metrics, step))
    with pytest.raises(Killed):
        ledger_run(**options, logger=logger).fit(validate=False)
    for _ in range(2):  # the second one finds it there
        ledger_run(**options, logger=tensorboard()).fit("last", validate=False)
        events = [EventAccumulator(str(file)).Reload() for file in event_files(tmp_path / "run")]
        for tag in ("zo/lr", "zo/projected_grad", "train/loss"):
            scalars = [event for file in events if tag in file.Tags()["scalars"] for event in file.Scalars(tag)]
            assert [event.step for event in scalars] == list(range(8)), tag


def test_a_step_that_was_logged_and_not_written_is_logged_once(
    ledger_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run without a checkpoint."""
    own, errors = Ledger.append, iter([Killed(), OSError()])  # one more where the callback ends the ledger

    def append(ledger: Ledger, record: StepRecord) -> None:
        if record.step == 3:
            raise next(errors)
        own(ledger, record)

    loggers = [TensorBoardLogger(tmp_path / "run", name="", version="") for _ in range(2)]
    options: dict[str, Any] = {"max_steps": 6, "log_every_n_steps": 1}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Ledger, "append", append)
        ledger_run(**options, logger=loggers[0]).fit(validate=False)
    loggers[0].finalize("failed")
    assert len(Ledger(tmp_path / "run/ledger.bin")) == 3
    ledger_run(**options, logger=loggers[1], go_on=True).fit(validate=False)
    events = [EventAccumulator(str(file)).Reload() for file in event_files(tmp_path / "run")]
    scalars = [event for file in events for event in file.Scalars("zo/lr")]
    assert [event.step for event in scalars] == list(range(6))
