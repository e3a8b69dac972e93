"""``--ckpt_path`` names a checkpoint from which a run cannot go on: one line, before anything is written."""

import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest
import torch

from cli_runs import Runs, refused

pytestmark = [
    pytest.mark.usefixtures("fresh_process"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Lightning 2.6 with jsonargparse 4.49
]


@pytest.mark.parametrize("word", ["last", "best"])
def test_a_run_without_a_checkpoint_does_not_start_anew(runs: Runs, word: str) -> None:
    message = runs.refused("fit", "--ckpt_path", word)
    assert message.startswith(f"error: `ckpt_path` is '{word}', but no version of this run in ") and "\n" not in message
    assert not (runs.folder / "logs").exists()


@pytest.mark.parametrize("length", [0, 5000])
def test_a_damaged_checkpoint_is_refused_before_the_model_is_loaded(runs: Runs, length: int) -> None:
    path = runs.folder / "saved.ckpt"
    torch.save({"weight": torch.ones(5000)}, path)
    path.write_bytes(path.read_bytes()[:length])
    message = runs.refused("fit", "--ckpt_path", path, "--model.init_args.model_name", runs.folder / "none")
    assert message == f"error: `ckpt_path` is {path}, which is empty, truncated or not a checkpoint."


def test_a_checkpoint_of_weights_alone_or_with_a_changed_bit_is_refused(runs: Runs) -> None:
    runs("fit", "--trainer.max_steps", 1)
    path = runs.version(0) / "checkpoints/last.ckpt"
    saved, content = torch.load(path, weights_only=True), bytearray(path.read_bytes())
    torch.save({key: saved[key] for key in saved.keys() - {"optimizer_states", "lr_schedulers"}}, path)
    assert runs.refused("fit", "--ckpt_path", path).startswith("error: `ckpt_path` holds weights only")
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for subcommand in ("fit", "export"):
        message = runs.refused(subcommand, "--ckpt_path", path)
        assert message.startswith(f"error: The checkpoint {path} is damaged: ") and "\n" not in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method.num_queries", 3], "`num_queries` is 3, was 1"),
        (["--method", "LOZO"], "written by MeZO, but this run trains with LOZO"),
        (["--trainer.precision", "32-true"], "`trainer.precision` is '32-true', but the checkpoint's run has"),
    ],
)
def test_other_settings_than_the_checkpoint_s(resumed: tuple[Runs, str], options: list[Any], words: str) -> None:
    runs, _ = resumed
    config = str(runs.version(0) / "config.yaml")
    if "LOZO" in options:
        options = [*options, "--resampling", "SubspaceResampling"]
    message = refused(
        ["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_steps", "9", *map(str, options)]
    )
    assert words in message and "\n" not in message


@pytest.mark.parametrize("written", ["ledger.bin", "checkpoints/.lock"])
def test_a_run_that_has_not_ended_is_left_alone(resumed: tuple[Runs, str], written: str) -> None:
    run = resumed[0].version(0)
    (run / written).touch()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    hold = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True)"
    hold += "; sys.stdin.read()"
    with Popen([sys.executable, "-c", hold, str(run / written)], stdin=PIPE, stdout=PIPE) as other:
        assert other.stdin is not None and other.stdout is not None
        other.stdout.readline()
        message = refused(["fit", "--config", str(run / "config.yaml"), "--ckpt_path", "last"])
        other.stdin.close()
    assert f"error: `ckpt_path` is of a run that has not ended: another process writes {run / written}." in message
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_checkpoint_of_another_model_and_a_folder(
    resumed: tuple[Runs, str], write_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    run = resumed[0].version(0)
    command = ["fit", "--config", str(run / "config.yaml"), "--trainer.max_steps", "9", "--ckpt_path"]
    message = refused([*command, "last", "--model.model_name", str(write_tiny_model(tmp_path / "opt", "opt"))])
    assert message.startswith("error: `ckpt_path` is of another model: ") and "\n" not in message
    message = refused([*command, str(run)])
    assert message.startswith(
        f"error: `ckpt_path` is {run}, which is a folder. Give one of the files in it: {run}/check"
    )
