"""The first run on a GPU, in miniature on the CPU: every part runs, and what goes wrong is written down."""

import csv
import ctypes
import faulthandler
import math
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graph_runs import CPUCapture
from zolightning.bench import bits, gpu, repetition, step
from zolightning.bench.__main__ import main
from zolightning.bench.figures import COLUMNS, Figures
from zolightning.bench.floors import Ceilings
from zolightning.bench.gpu import MINIATURE, Part, Sizes, parts, run_here
from zolightning.bench.kernel_cost import PIECES_MIB, measure_kernels
from zolightning.bench.rows import BY_NAME
from zolightning.bench.step import Settings
from zolightning.bench.step_records import Cost
from zolightning.evaluation.graphs import GraphedNetwork

CPU = torch.device("cpu")


def read(path: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Figures by part and name."""
    found: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    with path.open() as file:
        lines = csv.DictReader(file)
        assert lines.fieldnames == list(COLUMNS)
        for line in lines:
            found[line["part"]][line["name"]][line["figure"]] = line["value"]
    return found


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process a part takes seconds to import torch, and so do runs of all methods, and collecting garbage."""
    monkeypatch.setattr(gpu, "run_part", run_here)
    monkeypatch.setattr(step, "reset_peak", lambda device: True)
    chosen = ("MeZO", "ZO-MOPI")
    monkeypatch.setattr(repetition, "METHODS", {name: repetition.METHODS[name] for name in chosen})


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_part_runs_in_miniature(tmp_path: Path, device: str) -> None:
    path = tmp_path / "logs" / "gpu.csv"
    main(f"gpu --device {device} --miniature --output {path}".split())
    found = read(path)
    assert list(found) == [part.name for part in parts(MINIATURE)]
    assert {name: part["part"] for name, part in found.items()} == {name: {"finished": "1"} for name in found}
    assert found["bits"]["all from 0"] == {"cases": "224", "equal": "224"}
    sofar = {f"the first {count} from 0": {"equal": str(count)} for count in range(10, 225, 10)}
    assert found["bits"].keys() == {"machine", "all from 0", "part", *sofar}, "a case differs from the CPU's"
    assert {name: found["bits"][name] for name in sofar} == sofar
    assert found["bits"]["machine"]["torch"] == torch.__version__
    assert ("gpu" in found["bits"]["machine"]) == (device == "cuda")
    pieces = {"not perturbed", "whole", *(f"pieces of {mib} MiB" for mib in PIECES_MIB)}
    assert found["pieces"].keys() == {"part", *(f"64 x 32, 4 tokens, {name}" for name in pieces)}
    assert float(found["kernels"]["update exact, 5000 elements, gaussian, 1 queries"]["gb_per_second"]) > 0
    steps = found["steps of config:tiny"]
    for name in ("forward", "MeZO", "LOZO rank 4", "published"):
        for where in ("prompts", "random tokens", "memory on random tokens"):
            assert all(math.isfinite(float(value)) for value in steps[f"{name}, {where}"].values())
        memory = steps[f"{name}, memory on random tokens"]
        assert float(memory["peak_mib"]) > 0 and ("reserved_peak_mib" in memory) == (device == "cuda")
    assert float(steps["MeZO, prompts"]["floor_bytes_per_weight"]) == 16
    assert set(steps["published, answer logits, prompts"]) >= {"mean_seconds", "over_its_forwards"}
    assert "floor on prompts: update exact" in steps
    for method in ("MeZO", "ZO-MOPI"):
        assert found["resume"][method] == {"steps": "2", "same_records": "1", "same_weights": "1"}
    if device == "cuda":
        assert found["resume"]["MeZO, CUDA graphs"] == found["resume"]["MeZO"] | {"same_without_graphs": "1"}


def test_all_limits_together_are_eight_minutes() -> None:
    assert sum(part.limit for part in parts(Sizes())) <= 480
    assert {name for steps in Sizes().steps for name in steps.rows} <= BY_NAME.keys()


def test_other_bits_are_counted() -> None:
    ours = torch.tensor([0.0, -0.0, float("nan"), 1.0, 2.0])
    expected = torch.tensor([0.0, 0.0, float("nan"), float("nan"), 2.0])
    assert (
        bits._differing([ours, torch.tensor([1, 2], dtype=torch.int16)], [expected, torch.tensor([1, 3]).short()]) == 3
    )


@pytest.mark.parametrize("name", ["perturb", "add", "for_each"])
def test_the_last_elements_of_a_large_tensor_are_compared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {case.split()[0]: compare for case, compare in bits.comparisons(80, huge=4016)}
    assert all(compare(CPU) == 0 for compare in cases.values())
    own = getattr(bits.kernels, name)  # as if it had lost its place

    def lost(first: Any, *args: Any, **kwargs: Any) -> None:
        own(first, *args, **kwargs)
        changed = args[0][0]["weight"] if name == "for_each" else first
        changed[-1] += len(changed) > bits.TAIL

    monkeypatch.setattr(bits.kernels, name, lost)
    huge = {"perturb": "perturb_huge,", "add": "update_huge,", "for_each": "update_each_huge,"}[name]
    assert cases[huge](CPU) > 0


@pytest.mark.usefixtures("in_this_process")
def test_a_row_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = gpu.measure_costs

    def measure_costs(settings: Settings, names: Sequence[str]) -> dict[str, Cost]:
        if names == ["MeZO"]:
            raise torch.OutOfMemoryError("no memory is left\nand more")
        return measure(settings, names)

    monkeypatch.setattr(gpu, "measure_costs", measure_costs)
    (tiny,) = MINIATURE.steps
    chosen = replace(tiny, rows=("forward", "MeZO", "MeZO native"))
    part = next(part for part in parts(replace(MINIATURE, steps=(chosen,))) if part.name.startswith("steps"))
    run_here(part, CPU, tmp_path / "gpu.csv")
    found = read(tmp_path / "gpu.csv")[part.name]
    assert found["MeZO"] == {"failed": "OutOfMemoryError: no memory is left"}
    assert "MeZO native, prompts" in found and found["part"] == {"finished": "1"}


def test_a_kernel_at_the_bandwidth_of_a_copy_is_at_its_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zolightning.bench.kernel_cost.kernel_seconds", lambda call, device: 0.5)
    first, second, *_ = measure_kernels(CPU, (1000,), Ceilings(bytes_per_second=8000.0, flops_per_second=1.0))
    assert (first["gb_per_second"], first["over_floor"]) == (8e-6, 1.0)  # 4 bytes an element
    assert (second["gb_per_second"], second["over_floor"]) == (16e-6, 0.5)


def hang(device: torch.device, figures: Figures) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    figures.write("before", seconds=1.5)
    while True:
        time.sleep(60)


def crash(device: torch.device, figures: Figures) -> None:
    faulthandler.disable()
    figures.write("before", seconds=1.5)
    ctypes.string_at(0)


def measure(device: torch.device, figures: Figures) -> None:
    figures.write("bandwidth", gb_per_second=2)


def test_what_hangs_or_crashes_leaves_the_figures_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own, as ever, but forks: those begin at once."""
    monkeypatch.setattr(gpu, "get_context", lambda _: get_context("fork"))
    known = [
        Part("hangs", 2, (hang, measure, hang)),
        Part("crashes", 60, (crash, measure)),
        Part("last", 60, (measure,)),
    ]
    monkeypatch.setattr(gpu, "parts", lambda sizes: known)
    path = tmp_path / "gpu.csv"
    main(f"gpu --device cpu --miniature --output {path}".split())
    found = read(path)
    assert {name: part["bandwidth"] for name, part in found.items()} == {
        name: {"gb_per_second": "2"} for name in ("hangs", "crashes", "last")
    }
    assert found["hangs"]["before"] == found["crashes"]["before"] == {"seconds": "1.5"}
    assert path.read_text().count("hangs,part,out_of_time,2") == 2
    assert found["crashes"]["part"]["failed"] == f"exit status {-signal.SIGSEGV}"
    assert float(found["hangs"]["part"]["seconds"]) >= 2 and float(found["crashes"]["part"]["seconds"]) < 60
    assert found["last"]["part"].keys() == {"finished", "seconds"}


def test_every_comparison_is_made_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    known = [(str(number), lambda device, number=number: seen.append(number)) for number in range(11)]
    monkeypatch.setattr(gpu, "comparisons", lambda *_: iter(known))
    part, *_ = parts(Sizes())
    for place in range(len(part.runs)):
        run_here(part, CPU, tmp_path / "gpu.csv", place)
    assert len(part.runs) > 1 and sorted(seen) == list(range(11))


def test_every_run_is_repeated_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(gpu, "compare", lambda method, *_: seen.append(method) or {"steps": 1})
    monkeypatch.setattr(gpu, "runs", lambda device: [(str(number), str(number), False) for number in range(11)])
    part = next(part for part in parts(Sizes()) if part.name == "resume")
    for place in range(len(part.runs)):
        run_here(part, CPU, tmp_path / "gpu.csv", place)
    assert len(part.runs) > 1 and sorted(seen, key=int) == list(map(str, range(11)))


@pytest.mark.parametrize("differs", [None, "plain", "resumed"])
def test_a_run_with_graphs_is_compared_with_one_without(differs: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [cuda_graphs for *_, cuda_graphs in repetition.runs(torch.device("cuda"))][:3] == [True, True, False]

    def run(method: Any, cuda_graphs: bool, device: torch.device, module: Any, save_to: Path, resumed: Any) -> Any:
        name = "resumed" if resumed else "whole" if cuda_graphs else "plain"
        return ["second"] if resumed else ["first", "second"], "other" if name == differs else "weights"

    monkeypatch.setattr(repetition, "_run", run)
    found = repetition.compare(repetition.METHODS["MeZO"], True, CPU, "tiny", 2)
    same = {"same_records": 1, "same_weights": int(differs != "resumed")}
    assert found == {"steps": 2, "same_without_graphs": int(differs != "plain"), **same}


def test_a_run_whose_graphs_are_off_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise it would be compared with itself."""
    optimizer = repetition.METHODS["MeZO"]([torch.nn.Parameter(torch.ones(2))])
    optimizer.evaluator.graphs = GraphedNetwork(torch.nn.Linear(1, 1), CPUCapture())
    trainer: Any = SimpleNamespace(optimizers=[optimizer], global_step=0)
    records = repetition.Records(1, tmp_path / "x.ckpt")
    records.on_train_batch_end(trainer)
    optimizer.evaluator.graphs.is_off = True
    with pytest.raises(RuntimeError, match="no graph is replayed"):
        records.on_train_batch_end(trainer)
    assert len(records.records) == 1


def failing(message: str, device: torch.device, figures: Figures) -> None:
    figures.write("before", seconds=1.5)
    raise RuntimeError(message)


def test_a_part_that_fails_leaves_its_figures_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.csv"
    run_here(Part("one", 1, (partial(failing, "out of memory\nmore"),)), CPU, path)
    Figures(path, "two").write("next", seconds=None, gb=2)
    assert read(path) == {
        "one": {"before": {"seconds": "1.5"}, "part": {"failed": "RuntimeError: out of memory"}},
        "two": {"next": {"gb": "2"}},
    }
    assert "one | before: seconds 1.5" in capsys.readouterr().out


def test_runs_are_repeated_on_the_device_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A module that was made on a GPU says that it is on a CPU, until a Trainer has moved it."""
    asked: dict[str, Any] = {}

    def trainer(**options: Any) -> None:
        asked.update(options)
        raise InterruptedError

    monkeypatch.setattr(repetition.L, "Trainer", trainer)
    module = repetition.RandomTokens("tiny", CPU, torch.zeros(2, 1, 4, dtype=torch.long))
    with pytest.raises(InterruptedError):
        repetition._run(repetition.METHODS["MeZO"], False, torch.device("cuda"), module, tmp_path / "x", None)
    assert asked["accelerator"] == "gpu"


@pytest.mark.parametrize("command", ["gpu", "step --model config:tiny --device cuda"])
def test_without_a_gpu_a_line_says_so(command: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="finds no GPU"):
        main([*command.split(), "--output", str(tmp_path / "x.csv")])
    assert not (tmp_path / "x.csv").exists()


def without_packages(*words: str) -> str:
    """What a process prints that has no package of the command line."""
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    process = subprocess.run(
        [sys.executable, *words], cwd=tests.parent, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr
    return process.stdout


@pytest.mark.slow
def test_the_commands_for_a_gpu_need_nothing_of_the_command_line() -> None:
    code = """
import absent_packages, sys, torch
from pathlib import Path
from zolightning.bench import __main__, gpu
from zolightning.models import CausalLM
for part in gpu.parts(gpu.MINIATURE):
    gpu.run_here(part, torch.device("cpu"), Path("/dev/null"))
try:
    __main__.main(["gpu", "--help"])
except SystemExit as end:
    assert not end.code
"""
    output = without_packages("-W", "ignore", "-c", code)
    assert "failed" not in output and output.count("finished 1") == len(parts(MINIATURE))
    assert "usage: python -m zolightning.bench gpu" in output


@pytest.mark.slow
def test_tests_for_a_gpu_are_found_without_packages_of_the_command_line() -> None:
    words = ["-m", "pytest", "-q", "-p", "absent_packages", "-p", "no:cacheprovider", "-m", "gpu", "--collect-only"]
    found = without_packages(*words)
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        if "pytest.mark.gpu" in path.read_text() and path != Path(__file__):
            assert f"{path.name}::" in found, path
