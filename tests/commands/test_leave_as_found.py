"""A run that is refused before its first step leaves nothing, and its folder, if it goes on in one, as it was."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from cli_runs import Runs
from zolightning import CausalLM
from zolightning.checkpoints.checkpoint_io import LAST
from zolightning.checkpoints.save_last import SaveLast

pytestmark = [
    # Lightning 2.6 calls what jsonargparse 4.49 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_process"),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_rows(folder: Path, label: int) -> None:
    for split in ("train", "validation", "test"):
        rows = [f'{{"sentence": "a", "label": {number}}}\n' for number in (0, 1, label)]
        (folder / f"{split}.jsonl").write_text("".join(rows))


@pytest.mark.parametrize(
    ("subcommand", "options", "message"),
    [
        ("fit", ("--data.path", "{folder}"), "train.jsonl, line 3: label 7 in field `label`"),
        ("test", ("--data.path", "{folder}"), "test.jsonl, line 3: label 7 in field `label`"),
        ("fit", ("--data.prompt", "{{{{ nothing }}}}"), "field `nothing` is missing"),
        ("fit", ("--data.chat", "true"), "has no chat template"),
        ("fit", ("--trainer.callbacks", "[{{class_path: SubspaceResampling}}]"), "SubspaceResampling needs a subspace"),
        ("fit", ("--ckpt_path", "{folder}/other.ckpt"), "`ckpt_path` is of another model"),
        ("fit", ("--ckpt_path", "{folder}/plain.ckpt"), "`ckpt_path` is a file of torch's, but not a Trainer"),
        ("fit", ("--trainer.callbacks", "[{{class_path: zolightning.callbacks.SaveLast}}]"), "Found more than one"),
    ],
)
def test_nothing_is_left(runs: Runs, subcommand: str, options: tuple[str, ...], message: str) -> None:
    write_rows(runs.folder, 7)
    torch.save({"weight": torch.zeros(1)}, runs.folder / "plain.ckpt")
    other = {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "callbacks": {}, "loops": {}}
    torch.save(other, runs.folder / "other.ckpt")
    before = contents(runs.folder)
    error = runs.refused(subcommand, *(option.format(folder=runs.folder) for option in options))
    assert message in error and "\n" not in error
    assert contents(runs.folder) == before and not (runs.folder / "logs").exists()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--method", "LOZO"), marks=pytest.mark.slow),
        pytest.param(("--method.momentum", "0.9"), marks=pytest.mark.slow),
        ("--data.path", "{folder}"),
    ],
)
def test_a_run_that_goes_on_keeps_its_settings(runs: Runs, options: tuple[str, ...]) -> None:
    """Otherwise it could not go on by its ``config.yaml`` any more."""
    runs("fit", "--trainer.max_steps", 3)
    write_rows(runs.folder, 7)
    before = contents(runs.version(0))
    go_on = ("--config", runs.version(0) / "config.yaml", "--ckpt_path", "last", "--trainer.max_steps", 6)
    runs.refused("fit", *go_on, *(option.format(folder=runs.folder) for option in options))
    assert contents(runs.version(0)) == before
    runs("fit", *go_on)
    assert torch.load(runs.version(0) / "checkpoints" / LAST, weights_only=True)["global_step"] == 6


def test_what_another_process_writes_there_stays(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that start at once choose the same version, and the second is refused."""
    event_file = runs.version(0) / "events.out.tfevents.1.host.1.0"

    def fail(*_: Any) -> None:
        event_file.write_bytes(b"")
        raise BlockingIOError("Another process trains")

    monkeypatch.setattr(SaveLast, "on_fit_start", fail)
    with pytest.raises(BlockingIOError, match="Another process trains"):
        runs("fit", "--validate_first", "false")
    assert event_file.is_file() and (runs.version(0) / "config.yaml").is_file()


def test_a_run_that_fails_in_its_first_step_stays(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has said how it goes on."""
    monkeypatch.setattr(CausalLM, "on_train_batch_end", Mock(side_effect=ValueError("a bug of the user")))
    with pytest.raises(ValueError, match="a bug of the user"):
        runs("fit", "--validate_first", "false")
    assert (runs.version(0) / "config.yaml").is_file()
