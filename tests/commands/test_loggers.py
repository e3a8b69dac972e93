"""``--trainer.logger``: TensorBoard's logger gives a run its folder, others come with it."""

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning_utilities.core.imports import RequirementCache

from cli_runs import CONFIGS, Runs, parsed
from zolightning.commands.loggers import name_run, put_tensorboard_first, renamed

pytestmark = [
    pytest.mark.usefixtures("fresh_process"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Lightning 2.6 with jsonargparse 4.49
]
BOARD, CSV = "lightning.pytorch.loggers.TensorBoardLogger", "lightning.pytorch.loggers.CSVLogger"


def loggers(*options: Any) -> list[tuple[str, str, str]] | bool:
    """Class, folder and name of each logger that a command gets."""
    config = parsed(["fit", "--config", str(CONFIGS / "quickstart.yaml"), *map(str, options)]).fit
    put_tensorboard_first(config)
    name_run(config)
    found = config.trainer.logger
    if isinstance(found, bool):
        return found
    several = found if isinstance(found, list) else [found]
    assert isinstance(found, list) == (len(several) > 1)  # `--trainer.logger.name` reaches one
    return [(each.class_path.rpartition(".")[2], each.init_args.save_dir, each.init_args.name) for each in several]


def test_tensorboard_is_the_first_logger() -> None:
    first, csv_file = ("TensorBoardLogger", "logs", "quickstart"), ("CSVLogger", "logs", "quickstart/csv")
    assert loggers() == [first]
    assert loggers("--trainer.logger", "CSVLogger") == [first, csv_file]
    several = [
        {"class_path": CSV, "init_args": {"save_dir": "x"}},
        {"class_path": BOARD, "init_args": {"save_dir": "y"}},
    ]
    assert loggers("--trainer.logger", several) == [
        ("TensorBoardLogger", "y", "quickstart"),
        ("CSVLogger", "x", "quickstart/csv"),
    ]
    several[1]["init_args"] |= {"name": "mine"}  # type: ignore[operator]
    assert loggers("--trainer.logger", several)[1] == ("CSVLogger", "x", "mine/csv")  # type: ignore[index]
    assert loggers("--trainer.logger", "CSVLogger", "--trainer.logger.name", "own")[1][2] == "own"  # type: ignore[index]
    assert loggers("--trainer.logger", "CSVLogger", "--trainer.default_root_dir", "there") == [
        ("TensorBoardLogger", "there", "quickstart"),
        ("CSVLogger", "there", "quickstart/csv"),
    ]
    assert loggers("--trainer.logger", "false") is False
    assert loggers("--trainer.logger", "true") is True  # Lightning's own choice


def test_loggers_of_another_run() -> None:
    board = {"class_path": BOARD, "init_args": {"save_dir": "logs", "name": "sst2", "version": None}}
    other = {"class_path": CSV, "init_args": {"save_dir": "logs", "name": "sst2/csv"}}
    unnamed = {"class_path": "mine.Logger"}
    assert renamed(board, "sst2", "sst2/seed_1")["init_args"] == {
        "save_dir": "logs",
        "name": "sst2/seed_1",
        "version": 0,
    }
    first, second, third = renamed([board, other, unnamed], "sst2", "sst2/seed_1")
    assert (first["init_args"]["name"], second["init_args"]["name"]) == ("sst2/seed_1", "sst2/seed_1/csv")
    assert "version" not in second["init_args"] and third["class_path"] == "mine.Logger"


def test_a_logger_whose_package_is_missing(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = RequirementCache("absent_package")
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", missing)
    message = runs.refused("fit", "--trainer.logger", "WandbLogger")
    assert message == f"error: WandbLogger needs a package that is not installed: {missing}"
    assert not (runs.folder / "logs").exists()


def test_a_run_with_another_logger_goes_on_in_its_folder(runs: Runs) -> None:
    runs("fit", "--trainer.logger", "CSVLogger", "--trainer.max_steps", 3)
    folder = runs.version(0)
    assert (folder / "ledger.bin").is_file() and (folder / "checkpoints/last.ckpt").is_file()
    config = folder / "config.yaml"
    assert [each["class_path"] for each in yaml.safe_load(config.read_text())["trainer"]["logger"]] == [BOARD, CSV]

    output = runs("fit", "--trainer.logger", "CSVLogger", "--ckpt_path", "last")
    assert f"train longer: zolightning fit --config {config}" in output
    assert not runs.version(1).exists()
    assert sorted(runs.curves(0)["train/loss"]) == [1, 2, 3, 4, 5, 6]
    of_csv = [folder.parent / f"csv/version_{number}" for number in (0, 1)]
    assert steps(of_csv[0]) == {0, 1, 2} and steps(of_csv[1]) == {3, 4, 5}
    assert yaml.safe_load((of_csv[0] / "hparams.yaml").read_text())["method.lr"] == 0.1


def steps(folder: Path) -> set[int]:
    """Those whose training loss a CSVLogger has logged."""
    rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return {int(row["step"]) for row in rows if row.get("train/loss")}
