"""When steps in one layer at a time are faster than steps of all weights."""

import csv
from pathlib import Path

import pytest

from zolightning.bench.__main__ import main
from zolightning.bench.blocks import passes_for, speedup


def test_model_of_time() -> None:
    """Steps added up by hand, for four layers of which each in its turn is perturbed in the last two forwards."""
    layers, passes = 4, 5.0
    shared = sum(1 + 2 * (layers - index - 0.5) / layers + passes / layers for index in range(layers)) / layers
    assert speedup(passes, layers) == pytest.approx((2 + passes) / shared)
    assert speedup(passes, layers, shared=False) == pytest.approx((2 + passes) / (3 + passes / layers))
    assert speedup(passes, layers, beside=0.2) == pytest.approx((2 + passes) / (3 + passes * (0.2 + 0.8 / layers)))
    for is_shared in (True, False):
        assert speedup(passes_for(1.83, 48, is_shared), 48, shared=is_shared) == pytest.approx(1.83)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "blocks.csv"
    main(f"blocks --model config:tiny --batch-sizes 2 --prompt-batches 1 --repeats 1 --output {output}".split())
    with output.open() as file:
        (line,) = csv.DictReader(file)
    assert line["batch"] == "2"
    assert float(line["MeZO over FOCUS, layers"]) > 0 and float(line["by the model"]) > 0
    assert "passes must take 3.6 forwards where 48 layers share nothing, 1.7" in capsys.readouterr().out
