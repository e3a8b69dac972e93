"""``zolightning sweep-layers`` as a command: its files, its second call, its refusals."""

import csv
from pathlib import Path
from typing import Any

import pytest

from cli_runs import NAME, Runs
from zolightning.__main__ import main

# Lightning 2.6 calls what jsonargparse 4.49 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_process"),
]


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return {row["layer"]: row for row in csv.DictReader(file)}


def test_runs(runs: Runs) -> None:
    output = runs("sweep-layers", "--steps", 3)
    folder = runs.folder / "logs" / NAME / "sweep-layers"
    found = rows(folder)
    assert list(found) == ["zero-shot", "0", "1"]
    assert set(found["0"]) == {"layer", "parameters", "steps", "seconds", "val/accuracy", "val/f1", "val/loss"}
    assert (folder / "sweep.png").stat().st_size > 10_000
    assert f"written to {folder}" in output
    assert not list(folder.rglob("*.ckpt")) and not list((runs.folder / "logs" / NAME).glob("version_*"))

    again = runs("sweep-layers", "--steps", 3)
    assert again.rpartition("each layer alone")[2] == output.rpartition("each layer alone")[2]
    assert "layer 0: " in output and "layer 0: " not in again

    error = runs.refused("sweep-layers", "--steps", 4, "--data.init_args.batch_size", 4)
    assert "`steps` is 4, was 3" in error and "`data.init_args.batch_size` is 4, was 8" in error
    error = runs.refused("sweep-layers", "--steps", 3, "--method.lr", 0.02)
    assert "`method.init_args.lr` is 0.02, was 0.1" in error
    error = runs.refused("sweep-layers", "--steps", 3, "--seed_everything", 1)
    assert "`seed` is '1', was '0'" in error


def test_runs_first_order(runs: Runs) -> None:
    options = ("--steps", 2, "--layers", "[1]", "--first_order", "true", "--evaluate", "test")
    output = runs("sweep-layers", *options, method="adamw")
    folder = runs.folder / "logs/sentiment-adamw-smollm2_135m/sweep-layers-first-order"
    assert list(rows(folder)) == ["zero-shot", "1"]
    assert "backpropagation, test" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 0), "`steps` must be an integer, at least 1, got 0"),
        (("--layers", "[0,9]"), "`layers` is 9, but `model.model.layers` has 2 layers: 0 to 1 are accepted"),
        (("--output", "{folder}/model/config.json"), "`output` is {folder}/model/config.json, where no file can be"),
        (("--trainer.accumulate_grad_batches", 2), "`trainer.accumulate_grad_batches` is 2"),
    ],
)
def test_wrong_options_take_one_line(runs: Runs, options: tuple[Any, ...], message: str) -> None:
    folder = str(runs.folder)
    error = runs.refused("sweep-layers", *(str(option).format(folder=folder) for option in options))
    assert error.startswith("error: " + message.format(folder=folder))


def test_help(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, option in (
        (["sweep-layers"], "--first_order"),
        (["profile"], "--sensitivity_queries"),
        ([], "sweep-l"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main([*arguments, "--help"])
        assert exit_.value.code == 0
        assert option in capsys.readouterr().out
