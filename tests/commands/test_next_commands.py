"""A run says by which commands to go on from it, if they do."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from cli_runs import Runs, refused

pytestmark = [
    # Lightning 2.6 calls what jsonargparse 4.49 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_process"),
]


def said(runs: Runs, *options: Any, method: str | None = "mezo") -> dict[str, str]:
    """The commands that a run of a step prints at its end, by what they do."""
    short = ("--trainer.max_steps", 1, "--trainer.val_check_interval", 1, "--validate_first", "false")
    output = runs("fit", *short, "--test_last", "false", *options, method=method)
    return {line.partition(":")[0]: line for line in output.splitlines() if ": " in line and "zolightning" in line}


def test_an_average_is_not_replayed(runs: Runs) -> None:
    """The ledger has the steps, and not the average over them."""
    assert list(said(runs, "--trainer.callbacks+", "EMAWeightAveraging")) == ["export", "train longer"]


def test_no_folder_is_written_of_an_adapter_of_some_layers(runs: Runs) -> None:
    """PEFT's format cannot say how many; a checkpoint can be exported merged, as the refusal says."""
    scope = ("--scope", "TrainLayers", "--scope.layers", "[0]", "--scope.part", "LoRA")
    assert list(said(runs, "--model.num_layers", 1, *scope)) == ["train longer"]
    config, ledger = runs.version(0) / "config.yaml", runs.version(0) / "ledger.bin"
    arguments = ["--config", str(config), "--ledger", str(ledger), "--output", str(runs.folder / "new")]
    assert refused(["replay", *arguments]).startswith("error: `num_layers` is 1, which an adapter's folder cannot rec")


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ((), "max_steps"),
        (("--trainer.max_steps", -1, "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 1), "max_epochs"),
        # It would stop again at once
        (("--trainer.max_steps", 3, "--trainer.callbacks+", "ends.End"), None),
    ],
)
def test_a_run_is_lengthened_by_what_ended_it(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, options: tuple[Any, ...], limit: str | None
) -> None:
    (runs.folder / "ends.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "class End(Callback):\n"
        "    def on_train_batch_end(self, trainer, *_): trainer.should_stop = True\n"
    )
    monkeypatch.syspath_prepend(runs.folder)
    commands = said(runs, "--trainer.logger.init_args.name", "two words", *options)
    assert list(commands) == ["export", "replay", *(["train longer"] if limit else [])]
    if limit:
        assert commands["train longer"].endswith(f"--ckpt_path last --trainer.{limit} MORE")
    for command in commands.values():
        words = shlex.split(command)
        given = [words[at + 1] for at, word in enumerate(words) if word in ("--config", "--ckpt_path", "--ledger")]
        assert all(Path(path).is_file() for path in given if path != "last")


@pytest.mark.parametrize(("method", "is_resumable"), [("mezo", True), (None, False)])
def test_a_run_that_keeps_nothing_is_not_resumed(
    runs: Runs, caplog: pytest.LogCaptureFixture, method: str | None, is_resumable: bool
) -> None:
    """A ledger is enough."""
    with caplog.at_level("INFO"):
        assert list(said(runs, "--trainer.enable_checkpointing", "false", method=method)) == ["replay"] * is_resumable
    assert ("\nresume  zolightning fit" in caplog.text) == is_resumable
    if is_resumable:
        runs("fit", "--ckpt_path", "last", "--trainer.enable_checkpointing", "false")
        assert runs.metrics(0)["step"] == 6
