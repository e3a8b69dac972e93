"""Runs of the command ``zolightning`` on a tiny model, what it prints, and what they leave in a folder."""

import csv
import io
import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zolightning.__main__ import main
from zolightning.cli import ZerothOrderCLI
from zolightning.commands.arguments import prepared
from zolightning.commands.event_log import event_files

CONFIGS = Path(__file__).parent.parent / "configs"
NAME = "sentiment-mezo-smollm2_135m"


@dataclass
class Runs:
    """Runs ``zolightning`` on the tiny model of a folder and the packaged sentiment data, and reads what it leaves."""

    folder: Path

    def arguments(self, subcommand: str, *options: Any, method: str | None = "mezo") -> list[str]:
        overrides = {
            "--model.init_args.model_name": self.folder / "model",
            "--data.init_args.num_train": 64,
            "--data.init_args.num_validation": 20,
            "--data.init_args.num_test": 10,
            "--data.init_args.batch_size": 8,
            "--trainer.max_steps": 6,
            "--trainer.val_check_interval": 3,
            "--trainer.log_every_n_steps": 1,
            "--trainer.accelerator": "cpu",
            "--trainer.enable_progress_bar": "false",
            "--trainer.logger.init_args.save_dir": self.folder / "logs",
            "--trainer.default_root_dir": self.folder / "logs",
        }
        if method == "mezo":
            overrides["--method.lr"] = 0.1
        files = ["tasks/sentiment", *([f"methods/{method}"] if method else []), "models/smollm2_135m"]
        return [
            subcommand,
            *(part for file in files for part in ("--config", str(CONFIGS / f"{file}.yaml"))),
            *(str(part) for option in overrides.items() for part in option),
            *(str(option) for option in options),
        ]

    def __call__(self, subcommand: str, *options: Any, method: str | None = "mezo") -> str:
        """Runs a subcommand and returns what it printed."""
        return printed(self.arguments(subcommand, *options, method=method))

    def refused(self, subcommand: str, *options: Any, method: str | None = "mezo") -> str:
        """Returns the one line with which the command ends."""
        return refused(self.arguments(subcommand, *options, method=method))

    def version(self, number: int) -> Path:
        return self.folder / "logs" / NAME / f"version_{number}"

    def scalars(self, version: int) -> dict[str, dict[int, float]]:
        """By tag and step."""
        values: dict[str, dict[int, float]] = {}
        for file in event_files(self.version(version)):
            events = EventAccumulator(str(file)).Reload()
            for tag in events.Tags()["scalars"]:
                values.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
        return values

    def curves(self, version: int) -> dict[str, dict[int, float]]:
        """Those of ``curves.csv``, by metric and step; each step is there once."""
        found: dict[str, dict[int, float]] = {}
        for row in csv.DictReader((self.version(version) / "curves.csv").read_text().splitlines()):
            of_metric = found.setdefault(row["metric"], {})
            assert int(row["step"]) not in of_metric
            of_metric[int(row["step"])] = float(row["value"])
        return found

    def metrics(self, version: int) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((self.version(version) / "metrics.json").read_text())
        return read

    def texts(self, version: int) -> dict[str, str]:
        texts = {}
        for file in event_files(self.version(version)):
            events = EventAccumulator(str(file)).Reload()
            for tag in events.Tags()["tensors"]:
                texts[tag] = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        return texts


class ParseOnly(ZerothOrderCLI):
    """The real parser, without what comes after it."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def _prepare_subcommand_parser(self, *args: Any, **kwargs: Any) -> LightningArgumentParser:
        self._only = None  # one parser with the options of all commands
        return super()._prepare_subcommand_parser(*args, **kwargs)


@cache
def parser() -> LightningArgumentParser:
    """The parser of the command line, built once: that takes a second."""
    config = str(CONFIGS / "quickstart.yaml")
    return ParseOnly(["fit", "--config", config]).parser


def parsed(arguments: list[str]) -> Namespace:
    """The config that command-line arguments give."""
    return parser().parse_args(prepared(arguments))


def printed(arguments: list[str]) -> str:
    with redirect_stdout(io.StringIO()) as output:
        main(arguments)
    return output.getvalue()


def refused(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert isinstance(exit_.value.code, str)  # printed to stderr, exit status 1
    return exit_.value.code
