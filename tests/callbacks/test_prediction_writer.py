"""The file of predictions is JSON that any reader takes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zolightning.callbacks import PredictionWriter


def test_a_row_has_the_scores_of_its_own_candidates(tmp_path: Path) -> None:
    """Where another row of the batch has more, those that this one lacks are -inf, which is no JSON."""
    writer, trainer, module = PredictionWriter(str(tmp_path / "said.jsonl")), SimpleNamespace(global_rank=0), object()
    outputs: dict[str, Any] = {"id": torch.tensor([3, 4]), "prediction": torch.tensor([1, 2])}
    outputs["scores"] = torch.tensor([[-1.5, -1.0, -torch.inf], [-3.0, -4.0, -2.5]])
    writer.on_predict_start(trainer, module)  # type: ignore[arg-type]
    writer.on_predict_batch_end(trainer, module, outputs)  # type: ignore[arg-type]
    lines = (tmp_path / "said.jsonl").read_text().splitlines()
    read = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]
    assert read == [
        {"id": 3, "prediction": 1, "scores": [-1.5, -1.0]},
        {"id": 4, "prediction": 2, "scores": [-3.0, -4.0, -2.5]},
    ]
