"""The table of what training takes of a GPU."""

from functools import partial
from typing import Any

import pytest
import torch

from zolightning.bench.__main__ import main
from zolightning.bench.memory import CARDS, CONTEXT, MODES, cell
from zolightning.bench.shapes import model_of_shape
from zolightning.layers import find_layers
from zolightning.memory import BatchShape, MemoryPlan
from zolightning.optim import LOZO, ZOMOPI, HiZOO, MeZO, SubspaceOptimizer


@pytest.mark.parametrize(
    ("mode", "method"),
    [
        ("MeZO, `update_precision: exact`", MeZO),
        ("one layer, MeZO, exact", MeZO),
        ("FOCUS, exact", HiZOO),
        ("LOZO, exact, `offload_low_words`", partial(LOZO, rank=4, offload_low_words=True)),
        ("ZO-MOPI, rank 64, k 32, exact", partial(ZOMOPI, rank=64, power_rank=32)),
    ],
)
def test_bytes_are_those_of_a_run(mode: str, method: Any) -> None:
    planned = MODES[mode](model_of_shape("tiny", device="meta"), BatchShape(2, 8))
    network = model_of_shape("tiny")
    chosen = dict(network.named_parameters())
    if mode.startswith("one layer"):
        chosen = find_layers(network).parameters(0)
    optimizer = method(chosen.items(), lr=1e-6)
    optimizer.attach(network)
    if mode.startswith("FOCUS"):
        optimizer.set_blocks([layer.parameters() for layer in find_layers(network).layers])
        optimizer.activate([0])
    if isinstance(optimizer, SubspaceOptimizer):
        optimizer.fold_every_step = False
    ids = torch.arange(16).view(2, 8)
    for _ in range(2):
        optimizer.fold()
        optimizer.estimate(lambda: network(input_ids=ids, labels=ids, use_cache=False).loss.float())
        optimizer.step()
    assert (planned.state, planned.host) == (optimizer.state_bytes(), optimizer.host_bytes())
    assert planned.weights == sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def test_a_cell_names_the_smallest_card() -> None:
    gigabyte = 10**9
    assert cell(MemoryPlan(16 * gigabyte, 0, gigabyte)) == "17.8 (24)"
    assert cell(MemoryPlan(16 * gigabyte, 16 * gigabyte, gigabyte, host=2 * gigabyte)) == "33.8 (48) + 2.0"
    assert cell(MemoryPlan(CARDS[24] - CONTEXT)) == "25.3 (24)" and cell(MemoryPlan(CARDS[24])) == "26.1 (48)"
    assert cell(MemoryPlan(60 * gigabyte)) == "60.8 (80)" and cell(MemoryPlan(90 * gigabyte)) == "90.8 (-)"


def test_the_command_prints_a_table_in_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    main(["memory", "--models", "tiny", "--rows", "2", "4", "--length", "8"])
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert (head, rule) == ("| GB (smallest card) | tiny, 2 rows | tiny, 4 rows |", "|---|---|---|")
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(MODES)
    assert all(row.endswith((" 0.8 (24) |", " 0.8 (24) + 0.0 |")) for row in rows)
