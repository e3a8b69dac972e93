"""The floors that times stand beside: bytes and products counted from shapes, and prompts of real lengths."""

import statistics
from functools import partial

import pytest
import torch
from torch import nn

from zolightning.bench.floors import Ceilings, floor_table, forward_flops, perturbed_bytes
from zolightning.bench.lengths import LENGTHS, draw_prompts
from zolightning.bench.shapes import model_of_shape
from zolightning.bench.step import random_token_loss
from zolightning.bench.step_records import Workload, rates
from zolightning.commands import timing


def test_floors_of_llama_3_8b_on_an_h100() -> None:
    """7.505 billion weights in linears and head, 0.525 billion in a table of which rows are read; bf16, 3 TB/s."""
    ceilings = Ceilings(bytes_per_second=3.0e12, flops_per_second=800e12)
    floors = floor_table(model_of_shape("llama-3-8b", device="meta"), 4.88e12, ceilings)
    assert {floor["row"]: floor["milliseconds"] for floor in floors} == pytest.approx(
        {
            "two forwards": 12.2,
            "scratch, one pass a sign": 20.0,
            "scratch, both signs from one pass": 15.0,
            "update native": 10.7,
            "update exact": 21.4,
        },
        rel=5e-3,
    )


def test_a_tied_table_is_perturbed_as_the_head() -> None:
    model = model_of_shape("tiny", device="meta")
    parameters = list(model.parameters())
    assert perturbed_bytes(model, parameters) == 2 * sum(parameter.numel() for parameter in parameters)
    net = nn.ModuleDict({"table": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    assert perturbed_bytes(net, list(net.parameters())) == 4 * 28


def test_products_of_a_forward_are_counted() -> None:
    model, rows, length = model_of_shape("tiny", torch.float32), 2, 5
    products = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    attention = 2 * model.config.num_hidden_layers * model.config.hidden_size * length  # scores and values, a token
    found = forward_flops(partial(random_token_loss, model, torch.zeros(rows, length, dtype=torch.long)))
    # PyTorch does not count attention on every device.
    assert found in (2 * rows * length * products, 2 * rows * length * (products + attention))


def test_rates_of_a_step_at_its_floor() -> None:
    work = Workload(forwards=2, tokens=100, flops=1e12, parameter_bytes=4 * 10**9)
    found = rates("MeZO", 0.022, work, 10**9, Ceilings(2e12, 1e14), forward_seconds=0.010)
    expected = {"floor_seconds": 0.022, "over_floor": 1.0, "parameter_side_bytes_per_weight": 4.0}
    expected |= {"tokens_per_second": 100 / 0.022, "flop_utilisation": 0.020 / 0.022, "floor_bytes_per_weight": 4.0}
    assert found.pop("row") == "MeZO"
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("task", "mean"), [("sst2", 13.1), ("rte", 85.4), ("boolq", 147.5)])
def test_drawn_prompts_are_as_long_as_those_of_the_task(task: str, mean: float) -> None:
    assert len(LENGTHS[task]) == 100 and statistics.fmean(LENGTHS[task]) == pytest.approx(mean, abs=0.3)
    examples = draw_prompts(task, 4000, vocabulary=50)
    assert statistics.fmean(len(example.prompt_ids) for example in examples) == pytest.approx(mean, rel=0.05)
    assert draw_prompts(task, 4000, vocabulary=50) == examples
    assert {token for example in examples for token in example.prompt_ids} == set(range(50))


def test_drawn_prompts_of_one_length() -> None:
    assert [len(example.prompt_ids) for example in draw_prompts("6", 3, 50)] == [6, 6, 6]


def test_the_clock_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("done"))

    def clock() -> float:
        events.append("clock")
        return float(len(events))

    assert timing.seconds_of(lambda: events.append("started"), clock) == 3
    assert events == ["clock", "started", "done", "clock"]
