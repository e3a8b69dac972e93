"""When steps in one layer at a time are faster than steps of all weights."""

import csv
from pathlib import Path

import pytest

from zolightning.bench.__main__ import main
from zolightning.bench.blocks import speedup


def test_model_of_time() -> None:
    """Steps added up by hand, for four layers of which each in its turn is perturbed in the last two forwards."""
    layers, passes = 4, 5.0
    shared = sum(1 + 2 * (layers - index - 0.5) / layers + passes / layers for index in range(layers)) / layers
    assert speedup(passes, layers) == pytest.approx((2 + passes) / shared)
    assert speedup(passes, layers, beside=0.2) == pytest.approx((2 + passes) / (3 + passes * (0.2 + 0.8 / layers)))
    assert speedup(1.7258, 48) == pytest.approx(1.83, abs=1e-4)  # as the module's docstring says


def test_command(tmp_path: Path) -> None:
    output = tmp_path / "blocks.csv"
    main(f"blocks --model config:tiny --batch-sizes 2 --prompt-batches 1 --repeats 1 --output {output}".split())
    with output.open() as file:
        (line,) = csv.DictReader(file)
    assert line["batch"] == "2"
    assert float(line["MeZO over FOCUS, layers"]) > 0 and float(line["by the model"]) > 0
