"""Runs of a module in folders of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from checkpoint_runs import Run
from zolightning.checkpoints.keep_ledger import KeepLedger

MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(make_trainer: Callable[..., L.Trainer], regression_data: Callable[..., Any], tmp_path: Path) -> MakeRun:
    def make(folder: str = "run", **options: Any) -> Run:
        return Run(make_trainer, tmp_path / folder, regression_data().dataset, **options)

    return make


@pytest.fixture
def ledger_run(make_run: MakeRun) -> MakeRun:
    """Makes runs that keep a ledger; with `go_on`, that of an earlier one."""

    def make(folder: str = "run", go_on: bool = False, **options: Any) -> Run:
        where = make_run(folder).path.parent
        keep = KeepLedger(where, where / "ledger.bin" if go_on else None)
        run = make_run(folder, **options | {"callbacks": [keep, *options.get("callbacks", [])]})
        run.keep = keep
        return run

    return make


@pytest.fixture(scope="session")
def finished() -> dict[str, Run]:
    """Runs by what made them."""
    return {}


@pytest.fixture
def make_whole(make_run: MakeRun, finished: dict[str, Run]) -> MakeRun:
    """A run that nothing stopped; the same one wherever the same is asked for."""

    def run(validate: bool = True, **options: Any) -> Run:
        key = f"{validate} {options}"
        if key not in finished:
            finished[key] = make_run("whole", **options).fit(validate=validate)
        return finished[key]

    return run
