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


def test_each_rank_and_each_run_has_a_file_of_its_own(tmp_path: Path) -> None:
    """With what belongs to the rows, of outputs that have any."""
    writer, module = PredictionWriter(str(tmp_path / "made/said.jsonl")), object()
    for rank, id in ((0, 9), (0, 3), (1, 4)):
        trainer: Any = SimpleNamespace(global_rank=rank)
        writer.on_predict_start(trainer, module)  # type: ignore[arg-type]
        for outputs in (None, {"id": [id], "seconds": 0.5}):
            writer.on_predict_batch_end(trainer, module, outputs)  # type: ignore[arg-type]
    found = {path.name: path.read_text() for path in (tmp_path / "made").iterdir()}
    assert found == {"said.jsonl": '{"id": 3}\n', "said.jsonl.1": '{"id": 4}\n'}
