"""The benchmark of two ranks against one."""

import csv
from pathlib import Path

import pytest

from zolightning.bench.__main__ import main


@pytest.mark.slow
def test_a_line_for_each_way_to_split_a_step_and_bytes_that_do_not_depend_on_the_model(tmp_path: Path) -> None:
    output = tmp_path / "scale.csv"
    options = {"model": "small", "seq-len": 4, "batch-size": 2, "steps": 1, "rounds": 1, "output": output}
    main(["scale", *(f"--{name}={value}" for name, value in options.items())])
    lines = list(csv.DictReader(output.read_text().splitlines()))
    found = {line["split by"]: line["same bits as"] for line in lines if line["table"] == "scale"}
    alone = dict.fromkeys(["one process, 1 query", "one process, 2 queries"], "one process")
    assert found == alone | {"data": "each other", "query": "one process", "sign": "one process"}
    exchanged = {
        (line["network"], line["split by"]): (line["sums"], line["bytes of sums"]) for line in lines if line["sums"]
    }
    for model in ("small", "tiny"):
        # a sum and a number of terms for each of 4 and 2 evaluations, 8 bytes each
        assert exchanged[model, "data"] == exchanged[model, "query"] == ("1", "64")
        assert exchanged[model, "sign"] == ("1", "32")
