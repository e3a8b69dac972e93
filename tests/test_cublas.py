"""What a run needs to have the same bits again on a card: cuBLAS is told by the commands, memory is written first."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import zolightning.__main__ as command
from optimizer_steps import MakeProblem, Method, attached, weights
from zolightning.bench.figures import Figures
from zolightning.bench.gpu import Part, run_here
from zolightning.cublas import repeat_products

PRODUCTS = torch.backends.cuda.matmul
Settings = tuple[str | None, bool, bool]


def settings() -> Settings:
    reductions = PRODUCTS.allow_bf16_reduced_precision_reduction, PRODUCTS.allow_fp16_reduced_precision_reduction
    return os.environ.get("CUBLAS_WORKSPACE_CONFIG"), *reductions


@pytest.fixture(autouse=True)
def as_torch_begins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    PRODUCTS.allow_bf16_reduced_precision_reduction = PRODUCTS.allow_fp16_reduced_precision_reduction = True
    yield
    PRODUCTS.allow_bf16_reduced_precision_reduction = PRODUCTS.allow_fp16_reduced_precision_reduction = True
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_the_command_tells_cublas_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr(command, "main", lambda: seen.append(settings()))
    monkeypatch.setattr(command, "keep_freed_memory", lambda: None)
    command.console()
    assert seen == [(":4096:8", False, False)]


def test_a_part_of_the_benchmark_tells_it_in_its_own_process(tmp_path: Path) -> None:
    seen: list[Settings] = []

    def run(device: torch.device, figures: Figures) -> None:
        seen.append(settings())

    run_here(Part("one", 1, (run,)), torch.device("cpu"), tmp_path / "gpu.csv")
    assert seen == [(":4096:8", False, False)]


def test_a_workspace_of_the_environment_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    repeat_products()
    assert settings() == (":16:8", False, False)


@pytest.mark.filterwarnings("ignore:`update_precision` is 'native'")
def test_no_method_reads_memory_that_it_has_not_written(method: Method, make_problem: MakeProblem) -> None:
    """PyTorch fills new memory with NaNs when it is to be deterministic; `trainer.deterministic: true` asks for it."""
    found = []
    for deterministic in (False, True):
        problem = make_problem(torch.bfloat16)
        optimizer = attached(method, problem, seed=0)
        torch.use_deterministic_algorithms(deterministic)
        try:
            for _ in range(2):
                optimizer.estimate(problem)
                optimizer.step()
        finally:
            torch.use_deterministic_algorithms(False)
        found.append(weights(problem))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
