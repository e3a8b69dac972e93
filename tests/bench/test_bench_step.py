"""The benchmark of a training step: the recipe it compares with, and that it runs from end to end."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from graph_runs import CPUCapture
from zolightning.bench import step
from zolightning.bench.__main__ import main
from zolightning.bench.measure import peak_bytes, reset_peak
from zolightning.bench.rows import (
    DENSE,
    FORWARD,
    GRAPHED,
    POPULATIONS,
    PUBLISHED,
    PUBLISHED_ANSWERS,
    ROWS,
    SUBSPACE,
    Row,
    state_bytes,
)
from zolightning.models.attention_masks import causal_mask

RANDOM_TOKEN_COLUMNS = [
    "seconds",
    "min_seconds",
    "over_its_forwards",
    "published_over_row",
    "loading_peak_mib",
    "loaded_mib",
    "peak_mib",
    "peak_over_forward",
    "state_mib",
    "stateless_peak_over_forward",
    "peak_beyond_mib",
]
ON_PROMPTS = [PUBLISHED, PUBLISHED_ANSWERS, FORWARD, *DENSE, *SUBSPACE, *POPULATIONS]
FLOORS = [
    "two forwards",
    "scratch, one pass a sign",
    "scratch, both signs from one pass",
    "update native",
    "update exact",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_evaluates_and_moves_what_it_should(model: PreTrainedModel, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    tokens = torch.tensor([[6, 7, 8, 9]])
    count = sum(parameter.numel() for parameter in model.parameters())
    of_layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    expected = {"forward": 0, "published": 0, "MeZO": 2 * count, "MeZO native": 0, "MeZO rademacher": 2 * count}
    expected |= {"MeZO low byte": count, "MeZO, both signs in one forward": 2 * count}
    expected |= {"MeZO, layer L/3": 2 * of_layer, "MeZO, layer L/3, prefix shared": 2 * of_layer}
    expected |= {"MeZO-BCD, layers": 2 * of_layer, "FOCUS, cyclic": 2 * of_layer}  # of one of the two layers
    curvature = {"FOCUS, cyclic": 4 * of_layer}
    assert expected.keys() < {row.name for row in ROWS}
    for row in ROWS:
        calls = 0

        def loss() -> Tensor:
            nonlocal calls
            calls += 1
            return step.random_token_loss(model, tokens)

        made = row.make(model)
        made(loss)
        calls = 0
        made(loss)
        assert calls == row.forwards * row.steps, row.name
        if row.name in expected:  # state of subspace methods has its own tests
            completing = expected[row.name] if dtype == torch.bfloat16 else 0
            assert state_bytes(made) == completing + curvature.get(row.name, 0), row.name


@pytest.mark.parametrize("architecture", ["opt", "llama"])
def test_a_mask_as_on_a_gpu_changes_nothing(
    architecture: str, write_tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path, architecture)).eval()
    monkeypatch.setattr(step, "attention_mask_for", lambda network, mask: causal_mask(mask))
    tokens = torch.randint(100, (2, 9))
    inputs = step.mask_inputs(model, tokens)
    assert inputs["attention_mask"].shape == (2, 1, 9, 9)
    torch.testing.assert_close(model(tokens, **inputs).logits, model(tokens).logits)


@pytest.mark.parametrize("row", GRAPHED, ids=lambda row: row.name)
def test_rows_with_graphs_keep_them(
    row: Row, write_tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With masks as on a GPU OPT, which counts positions by others, asks its device for nothing."""
    capture = CPUCapture()
    for place in ("bench.rows", "evaluation.evaluator"):
        monkeypatch.setattr(f"zolightning.{place}.CudaCapture", lambda device: capture)
    monkeypatch.setattr(step, "attention_mask_for", lambda network, mask: causal_mask(mask))
    model = AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path, "opt"), dtype=torch.float64).eval()
    tokens = torch.randint(100, (2, 9))

    def loss() -> Tensor:
        return model(tokens, use_cache=False, **step.mask_inputs(model, tokens)).logits.square().mean()

    made = row.make(model)
    for _ in range(6):
        made(loss)
    # LOZO's first step has no core that is pending, which is another graph.
    assert capture.recorded == 1 + row.name.startswith("LOZO") and capture.replayed >= 4


def test_rows_are_chosen_by_name() -> None:
    rows = step.Settings("nowhere", rows=["LOZO", "native"]).chosen(ROWS)
    assert [row.name for row in rows] == ["forward", "published", "MeZO native", "LOZO rank 4"]
    assert step.Settings("nowhere").chosen(ROWS) == ROWS


@pytest.mark.skipif(not reset_peak(), reason="this system cannot reset a peak")
def test_peak_begins_anew() -> None:
    torch.ones(2**25)
    before = peak_bytes()
    assert reset_peak()
    after = peak_bytes()
    assert before - after > 2**26
    torch.ones(2**25)
    assert peak_bytes() - after > 2**26


@pytest.mark.slow
def test_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A process a row takes seconds to import torch: only one is started here.
    fresh = step.in_fresh_process

    def run(function: Callable[..., Any], settings: step.Settings, name: str, **variables: Any) -> Any:
        return fresh(function, settings, name, **variables) if name == DENSE[0].name else function(settings, name)

    monkeypatch.setattr(step, "in_fresh_process", run)
    monkeypatch.setattr(step, "reset_peak", lambda device: True)  # collecting garbage takes longer than the steps
    output = tmp_path / "bench" / "step.csv"
    threads = torch.get_num_threads()
    main(
        f"step --model {folder} --batch-size 3 --seq-len 5 --prompt-batches 2 --noise-elements 4096 --repeats 2 "
        f"--threads {threads} --output {output}".split()
    )

    printed = capsys.readouterr().out
    assert "3 x 5 random tokens" in printed
    assert "difference" in printed
    assert "noise for 4,096 elements" in printed
    with output.open() as file:
        lines = list(csv.DictReader(file))
    named: dict[str, list[dict[str, str]]] = {}
    for line in lines:
        named.setdefault(line["table"], []).append(line)
    assert [line["row"] for line in named["random tokens"]] == [row.name for row in ROWS]
    assert [line["row"] for line in named["prompts"]] == [row.name for row in ON_PROMPTS]
    for table in ("random tokens", "prompts"):
        rates = {line["row"]: line for line in named[f"{table}, rates"]}
        assert list(rates) == [line["row"] for line in named[table]]
        for name, rate in rates.items():
            assert float(rate["tokens_per_second"]) > 0 and 0 < float(rate["flop_utilisation"]) < 2, name
            assert (rate["over_floor"] == "") == name.startswith("published")
        # scratch at two evaluations, read and written; the update reads and writes the weight with its low word. Of
        # 5,152 weights all are perturbed, because the table of embeddings is the head.
        assert float(rates["MeZO"]["floor_bytes_per_weight"]) == 2 * 4 + 8
        assert float(rates["MeZO, both signs in one forward"]["floor_bytes_per_weight"]) == 2 + 4 + 8
        assert float(rates["MeZO native"]["floor_bytes_per_weight"]) == 2 * 4 + 4
        assert float(rates["LOZO rank 4"]["floor_bytes_per_weight"]) == 0
        assert float(rates["ES, 8 members in one forward"]["floor_bytes_per_weight"]) == 8 * 4 + 8
        assert float(rates["EGGROLL, 8 members in one forward"]["floor_bytes_per_weight"]) == 8
        assert [line["row"] for line in named[f"floors on {table}"]] == FLOORS
    assert [line["row"] for line in named["noise"]] == [
        f"{name} {dtype}"
        for dtype in ("float32", "bfloat16")
        for name in ("torch.normal", "ours gaussian", "ours rademacher")
    ]
    for line in lines:
        assert line["row"] in printed
        assert (line["precision"], line["torch"], line["threads"]) == ("bf16-true", torch.__version__, str(threads))
        assert line["cpu"]
    for line in named["random tokens"]:
        figures = {column: float(line[column]) for column in RANDOM_TOKEN_COLUMNS}
        beyond = figures.pop("peak_beyond_mib")
        assert math.isfinite(beyond)
        assert all(math.isfinite(figure) and figure >= 0 for figure in figures.values())
        assert 0 < figures["min_seconds"] <= figures["seconds"]
        assert figures["peak_mib"] >= figures["loaded_mib"] > 0
        assert (figures["state_mib"] > 0) == (line["row"] not in ("forward", "published", "MeZO native"))
        assert figures["stateless_peak_over_forward"] <= figures["peak_over_forward"]
    forward, published, *_ = named["random tokens"]
    assert float(forward["over_its_forwards"]) == 1
    assert float(forward["peak_over_forward"]) == 1
    assert float(published["published_over_row"]) == 1
    for line in named["prompts"]:
        assert float(line["mean_seconds"]) > 0 and float(line["published_over_row"]) > 0
        assert line["over_its_forwards"] == "" if line["row"] == "published" else float(line["over_its_forwards"]) > 0
    tokens = [float(line["tokens_per_forward"]) for line in named["prompts"]]
    assert tokens[1] == tokens[2] == tokens[3] < tokens[0] / 2
    for line in named["noise"]:
        assert float(line["elements_per_second"]) > 0 and float(line["row_over_torch_normal"]) > 0
    assert [line["row"].split(",")[0] for line in named["orthogonalization"]] == [
        "Newton-Schulz",
        "SVD",
        "power iteration",
    ]
    for line in named["orthogonalization"]:
        assert float(line["seconds"]) > 0 and float(line["over_newton_schulz"]) > 0


def test_command_for_a_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "in_fresh_process", lambda function, *arguments, variables: function(*arguments))
    monkeypatch.setattr(step, "reset_peak", lambda device: True)
    output = tmp_path / "step.csv"
    sizes = "--batch-size 3 --seq-len 4 --lengths 5 --prompt-batches 1 --noise-elements 512 --repeats 1"
    main(f"step --model config:tiny --rows native {sizes} --output {output}".split())
    assert "batches of 3 prompts from drawn lengths (5)" in capsys.readouterr().out
    with output.open() as file:
        prompts = {line["row"]: line for line in csv.DictReader(file) if line["table"] == "prompts"}
    tokens = {name: float(line["tokens_per_forward"]) for name, line in prompts.items()}
    # as published: a row a candidate, padded to a multiple of eight
    assert tokens == {"published": 48, "published, answer logits": 15, "forward": 15, "MeZO native": 15}


def test_what_was_measured_is_written_if_the_rest_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "in_fresh_process", lambda function, *arguments, variables: function(*arguments))
    monkeypatch.setattr(step, "measure_costs", fail)
    output = tmp_path / "step.csv"
    with pytest.raises(KeyboardInterrupt):
        main(f"step --model config:tiny --rows native --batch-size 3 --seq-len 4 --output {output}".split())
    with output.open() as file:
        peaks = {line["row"]: float(line["peak_mib"]) for line in csv.DictReader(file)}
    assert list(peaks) == ["forward", "published", "MeZO native"]
    assert min(peaks.values()) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch-size 0", "`--batch-size` must be at least 1, got 0"),
        ("--rows (", "`--rows` must be regular expressions, got '('"),
        ("--rows LOZO LOZZO", "`--rows` 'LOZZO' matches no row; there are forward, published"),
        ("--seq-len 1", "`--seq-len` must be at least 2, got 1"),
        ("--lengths cola", "`--lengths` must be one of sst2, rte, boolq, or a number of tokens, got 'cola'"),
        ("--precision bf16-mixed", "--precision: invalid choice: 'bf16-mixed'"),
    ],
)
def test_arguments_are_checked(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["step", "--model", "nowhere", *arguments.split()])
    assert message in f"{refused.value} {capsys.readouterr().err}"
