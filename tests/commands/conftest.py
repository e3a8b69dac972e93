"""A network of layers that is small enough to take apart, and the command line on a tiny model."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from cli_runs import Runs


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


@pytest.fixture(scope="module")
def fresh_process() -> Iterator[None]:
    """The seed of ``seed_everything`` is kept to this module, and pytest's own arguments from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["zolightning"])
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("PL_SEED_WORKERS", "0")
        yield


@pytest.fixture
def runs(tmp_path: Path, write_tiny_model: Callable[..., Path]) -> "Runs":
    from cli_runs import Runs  # this file is read before pytest can skip what lacks a package

    write_tiny_model(tmp_path / "model")
    return Runs(tmp_path)


@pytest.fixture(scope="module")
def resumed(
    tmp_path_factory: pytest.TempPathFactory, write_tiny_model: Callable[..., Path], fresh_process: None
) -> "tuple[Runs, str]":
    """Three steps, and three more by the run's config.yaml alone, with the test at the end; and what was printed."""
    from cli_runs import Runs, printed  # as above

    folder = tmp_path_factory.mktemp("resumed")
    write_tiny_model(folder / "model")
    runs = Runs(folder)
    runs("fit", "--trainer.max_steps", 3, "--trainer.val_check_interval", 1)
    config = runs.version(0) / "config.yaml"
    arguments = ["--ckpt_path", "last", "--trainer.max_steps", "6", "--test_last", "true"]
    return runs, printed(["fit", "--config", str(config), *arguments])
