"""The documents, their blocks of code, and a way to run the Python of one."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader

ROOT = Path(__file__).parent.parent
PACKAGE = "zolightning/README.md"
DOCUMENTS = [
    "README.md",
    "configs/README.md",
    "configs/from_mezo.md",
    "logs/README.md",
    "logs/bench/gpu.md",
    "logs/bench/step.md",
    "logs/evidence/methods.md",
    "logs/evidence/recipe.md",
    "logs/evidence/scope.md",
    "logs/evidence/tasks.md",
    PACKAGE,
    ".github/CONTRIBUTING.md",
    ".github/CHANGELOG.md",
]


def text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[tuple[int, str]]:
    """Fenced blocks, each with the number of its first line."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text(document), re.MULTILINE | re.DOTALL)
    return [(text(document)[: match.start(1)].count("\n") + 1, match[1]) for match in found]


def run_python(
    document: str, make_module: Callable[..., L.LightningModule], loader: DataLoader, patch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Runs all Python of a document, one block after the other, with Trainers that end after a few steps."""
    trainer_class = L.Trainer

    def trainer(**options: Any) -> L.Trainer:
        short = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in options.get("callbacks", [])),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_steps": 4,
        }
        return trainer_class(**options | short)

    patch.setattr(L, "Trainer", trainer)
    # What the text leaves to the reader
    names: dict[str, Any] = {
        "any_lightning_module": make_module(),
        "datamodule": loader,
        "loader": loader,
        "model": make_module().net,
        "L": L,
        "torch": torch,
        "F": F,
        "partial": partial,
    }
    for line, code in blocks(document, "python"):
        exec(compile("\n" * (line - 1) + code, ROOT / document, "exec"), names)
    return names
