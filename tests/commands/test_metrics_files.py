"""``metrics.json`` and ``curves.csv`` in the folders of runs."""

import errno
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from cli_runs import Runs
from zolightning.commands import metrics_files

pytestmark = [
    # Lightning 2.6 calls what jsonargparse 4.49 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_process"),
]


def test_neither_an_error_nor_a_full_disk_costs_more_than_the_latest(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    write = metrics_files.replace_text

    def full_at_first(path: Path, text: str) -> None:
        if not runs.version(0).joinpath("ledger.bin").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    def fail(self: Any, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 5:
            seen.append(runs.metrics(0)["state"])
            raise RuntimeError("the fifth step")

    monkeypatch.setattr(metrics_files, "replace_text", full_at_first)
    monkeypatch.setattr("zolightning.callbacks.RunMonitor.on_train_batch_end", fail)
    message = r"metrics\.json and curves\.csv of .* are not up to date: .*No space left"
    with pytest.raises(RuntimeError, match="the fifth step"), pytest.warns(UserWarning, match=message):
        runs("fit")
    assert seen == ["running"]
    assert runs.metrics(0)["state"] == "interrupted"
    assert sorted(runs.curves(0)["val/accuracy"]) == [0, 3]
