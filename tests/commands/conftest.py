"""A network of layers that is small enough to take apart, and the command line on a tiny model."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cli_runs import CONFIGS, Runs
from zolightning.cli import main


class Layers(nn.Module):
    """Residual layers of two linear maps with a nonlinearity between them, and a head, in float64."""

    def __init__(self, count: int = 3, width: int = 6) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width)) for _ in range(count)
            )
            self.head = nn.Linear(width, 1)
            self.double()
            self.inputs, self.targets = torch.randn(8, width).double(), torch.randn(8, 1).double()

    def forward(self) -> Tensor:
        """The loss of a batch that is always the same."""
        hidden = self.inputs
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return (self.head(hidden) - self.targets).square().mean()


@pytest.fixture
def make_layers() -> Callable[..., Layers]:
    return Layers


@dataclass
class CommandLine:
    """Runs ``zolightning`` on a tiny model of two layers, with the packaged sentiment data."""

    folder: Path

    def arguments(self, subcommand: str, *options: Any, method: str | None = "mezo") -> list[str]:
        files = ["tasks/sentiment", "models/smollm2_135m", *([f"methods/{method}"] if method else [])]
        overrides = {
            "--model.init_args.model_name": self.folder / "model",
            "--data.init_args.num_train": 32,
            "--data.init_args.num_validation": 10,
            "--data.init_args.num_test": 10,
            "--data.init_args.batch_size": 4,
            "--trainer.accelerator": "cpu",
            "--trainer.precision": "32-true",
            "--trainer.enable_progress_bar": "false",
            "--trainer.logger.init_args.save_dir": self.folder / "logs",
            "--trainer.default_root_dir": self.folder / "logs",
        }
        if method == "mezo":
            overrides["--trainer.callbacks.init_args.method.init_args.lr"] = 0.01
        return [
            subcommand,
            *(part for file in files for part in ("--config", str(CONFIGS / f"{file}.yaml"))),
            *(str(part) for option in overrides.items() for part in option),
            *(str(option) for option in options),
        ]

    def __call__(self, subcommand: str, *options: Any, method: str | None = "mezo") -> str:
        """Returns what was printed."""
        with redirect_stdout(io.StringIO()) as output:
            main(self.arguments(subcommand, *options, method=method))
        return output.getvalue()

    def refused(self, subcommand: str, *options: Any, method: str | None = "mezo") -> str:
        """Returns the one line with which the command ends."""
        with pytest.raises(SystemExit) as exit_:
            self(subcommand, *options, method=method)
        assert isinstance(exit_.value.code, str)
        return exit_.value.code


@pytest.fixture
def command_line(tmp_path: Path, write_tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    monkeypatch.setattr(sys, "argv", ["zolightning"])
    # What `seed_everything` sets is taken back after the test.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    write_tiny_model(tmp_path / "model")
    return CommandLine(tmp_path)


@pytest.fixture(scope="module")
def fresh_process() -> Iterator[None]:
    """``sys.argv`` without pytest's arguments, and the seed of ``seed_everything`` kept to this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["zolightning"])
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("PL_SEED_WORKERS", "0")
        yield


@pytest.fixture
def runs(tmp_path: Path, write_tiny_model: Callable[..., Path]) -> Runs:
    write_tiny_model(tmp_path / "model")
    return Runs(tmp_path)
