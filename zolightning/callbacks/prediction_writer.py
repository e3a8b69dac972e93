"""Writes predictions to a file."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class PredictionWriter(Callback):
    """During ``predict``, writes a line of JSON for each example.

    A line holds what ``predict_step`` returns for the example: for CausalLM its id, and either the scores of its
    candidates with the index of the best one, or the generated text. Each run overwrites the file. With several ranks,
    rank r > 0 writes to ``<path>.r``.

    Args:
        path: the file to write.
    """

    def __init__(self, path: str = "predictions.jsonl") -> None:
        self.path = path

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._file = Path(f"{self.path}.{trainer.global_rank}" if trainer.global_rank else self.path)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text("")

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        if not isinstance(outputs, Mapping):
            return
        columns = {
            name: value.tolist() if isinstance(value, Tensor) else value
            for name, value in outputs.items()
            if isinstance(value, Tensor | list)
        }
        with self._file.open("a") as file:
            for row in zip(*columns.values(), strict=True):
                line = dict(zip(columns, map(_present, row), strict=True))
                file.write(json.dumps(line) + "\n")


def _present(value: Any) -> Any:
    """Scores without -inf, which JSON cannot express: those of candidates that only other examples have."""
    return [score for score in value if score != -math.inf] if isinstance(value, list) else value
