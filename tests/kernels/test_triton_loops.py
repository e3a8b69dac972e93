"""The Triton loops give the bits of the CPU's: in Triton's interpreter, and on a device where there is one."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zolightning import kernels
from zolightning.bench import bits
from zolightning.directions.dense import accumulate_each, directions
from zolightning.kernels import compiled, native, torch_loops
from zolightning.kernels.compiled import _Compiler

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def run(program: list[str], **environment: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    done = subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


_INTERPRET = """
import json
import torch
from zolightning import kernels
from zolightning.bench import bits
from zolightning.bench.loop_runs import noise
from zolightning.directions.dense import accumulate_each, directions
from zolightning.kernels import triton_loops

def differing(elements, block, chunk, is_first_only):
    # A program costs as much with any block: all cases by one for each tensor, the first of each kind by several.
    triton_loops._BLOCK, triton_loops._CHUNK = block, chunk
    kinds = {}
    for name, compare in bits.comparisons(elements, None, triton_loops):
        kind = name.split()[0], *(shape for shape in ("scaled", "masked", "True") if shape in name)
        if not is_first_only or kind not in kinds:
            kinds.setdefault(kind, []).append(name)
            if compare(bits.CPU):
                yield name
    counts.append(sum(map(len, kinds.values())))

def for_each(loop, calls):
    triton_loops.for_each(getattr(triton_loops, loop.__name__), calls)

counts = []
found = {"differing": [*differing(341, 1024, 1, False), *differing(341, 256, 2, True)], "counts": counts}
missing = torch.empty(2, 4)
triton_loops.perturb_rows(missing, torch.ones(3, 4), torch.tensor([-1, 3]), noise(1, "gaussian", bits.CPU))
found["missing rows are NaN"] = bool(missing.isnan().all())

triton_loops._tables.cache_clear()
kernels.for_each = for_each
vectors, cores, others = {name: torch.zeros(32) for name in "ab"}, {"c": torch.zeros(32)}, []
for step in range(4):
    pair = [directions(part, 0, step, {0: 0.1}, "gaussian") for part in (vectors, cores)]  # a table of keys each
    accumulate_each([*pair[0].values(), *pair[1].values()], [*vectors.values(), *cores.values()])
    others.append(torch.empty(100 * step))  # so that tables are elsewhere at each step
found["tables"] = triton_loops._tables.cache_info().misses
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What a process of its own finds: Triton reads the variable when it is imported."""
    found: dict[str, Any] = json.loads(run(["-c", _INTERPRET], TRITON_INTERPRET="1", OMP_NUM_THREADS="1"))
    return found


@needs_triton
def test_the_interpreter_gives_the_bits_of_the_cpu(interpreted: dict[str, Any]) -> None:
    assert not interpreted["differing"]
    everything, kinds = interpreted["counts"]
    assert everything > 180 and kinds >= 16
    assert interpreted["missing rows are NaN"], "a row that does not exist was read"


@needs_triton
def test_tables_of_several_tensors_are_made_once(interpreted: dict[str, Any]) -> None:
    assert interpreted["tables"] == 2


_COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from types import SimpleNamespace
from zolightning.kernels import triton_loops
from zolightning.kernels.adam import adam_step
from zolightning.kernels.curvature import Change
from zolightning.kernels.noise import Noise

triton.runtime.driver.set_active(SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
))

def compile(kernel, grid, where, *arguments, **constants):
    options = {"num_warps": triton_loops._NUM_WARPS, "enable_fp_fusion": False}
    code = kernel.warmup(*arguments, **constants, **options, grid=grid).asm["ptx"]
    print("fma" in code, "mul.f32" in code or "mul.rn.f32" in code, "st.global.v4.b32" in code, "popc" in code)

triton_loops._launch = compile
noise = Noise(torch.ones(1, 2, dtype=torch.int32), torch.ones(1), "gaussian")
fp32, (bf16, plus, minus) = torch.empty(4096), torch.empty(3, 4096, dtype=torch.bfloat16)
triton_loops.perturb_both(plus, minus, bf16, noise)
triton_loops.add(bf16, noise, decay=0.9, extra_bits=torch.empty(4096, dtype=torch.int16))
triton_loops.add(fp32, noise, decay=0.9)
triton_loops.perturb_rows(plus.view(2, 2048), bf16.view(2, 2048), torch.arange(2), noise)
triton_loops.perturb(plus, bf16, noise, threshold=0.5)
triton_loops.perturb(plus, bf16, noise, curvature=fp32)
low = torch.empty(2, 4096, dtype=torch.int16)
change, step = Change(0.0, torch.ones(1), 0.1, 9.0), adam_step((0.9, 0.999), 2, 1e-8, 0.1)
mean, square = torch.empty(2, 4096)
triton_loops.add_curved(bf16, fp32, noise, change, extra_bits=low[0])
triton_loops.add_adam(bf16, mean, square, noise, step, 0.9, low[0])

def for_each(loop, *calls):
    triton_loops.for_each(loop, [{"noise": noise} | call for call in calls])

for_each(triton_loops.add, *({"weight": w, "decay": 0.9, "extra_bits": low[i]} for i, w in enumerate((bf16, plus))))
for_each(triton_loops.add, {"weight": bf16, "threshold": 0.5, "extra_bits": low[0]})
for_each(triton_loops.perturb, *({"out": out, "weight": bf16} for out in (plus, minus)))
for_each(triton_loops.perturb, {"out": plus, "weight": bf16, "curvature": fp32})
for_each(triton_loops.add_curved, {"weight": bf16, "curvature": fp32, "change": change, "extra_bits": low[0]})
for_each(triton_loops.add_adam, {"weight": bf16, "mean": mean, "square": square, "step": step, "decay": 0.9})
triton_loops.for_each(triton_loops.add_delta, [{"weight": bf16, "delta": fp32, "decay": 0.9, "scale": 0.5}])
"""


@pytest.mark.slow
@needs_triton
def test_compiled_for_a_device_nothing_is_fused_and_accesses_are_of_16_bytes(tmp_path: Path) -> None:
    """For an H100, by Triton's own compiler, which needs no device."""
    lines = run(["-c", _COMPILE], TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    *with_noise, without_noise = lines
    assert without_noise == "False True True False" and with_noise == ["False True True True"] * 14


class TestChoice:
    @pytest.fixture(autouse=True)
    def fresh(self) -> Iterator[None]:
        found = kernels._triton_loops
        found.cache_clear()
        yield
        found.cache_clear()

    def test_by_device_and_dtype(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def on_cuda(dtype: torch.dtype) -> SimpleNamespace:
            return SimpleNamespace(device=torch.device("cuda"), is_cpu=False, dtype=dtype)

        def chosen(*tensors: object, start: int = 0) -> object:
            return kernels._backend(*tensors, start=start)

        loops = SimpleNamespace(available=lambda *tensors, start: tensors[0].dtype != torch.float64 and start % 2 == 0)
        monkeypatch.setattr(kernels, "_triton_loops", lambda: loops)
        assert chosen(on_cuda(torch.bfloat16), on_cuda(torch.bfloat16)) is loops
        assert chosen(on_cuda(torch.float64)) is torch_loops
        assert chosen(on_cuda(torch.float32), start=1) is torch_loops
        assert chosen(torch.empty(2, device="meta")) is torch_loops
        assert chosen(torch.empty(2)) is (native if native.available(torch.empty(2)) else torch_loops)
        monkeypatch.setattr(kernels, "_triton_loops", lambda: None)
        assert chosen(on_cuda(torch.bfloat16)) is torch_loops

    def test_without_triton_one_warning_names_the_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "zolightning.kernels.triton_loops", None)
        monkeypatch.delattr(kernels, "triton_loops", raising=False)
        with pytest.warns(UserWarning, match=r"Triton is not usable here \(.*triton_loops.*several times slower"):
            assert kernels._triton_loops() is None
        kernels._triton_loops.cache_clear()
        assert kernels._triton_loops() is None  # a second warning would be an error
        compiled.slower("torch.compile", RuntimeError("for the same reason"))

    def test_it_may_be_switched_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ZOLIGHTNING_TRITON", "0")
        assert kernels._triton_loops() is None


def differing(pattern: str = ".*") -> list[str]:
    """The cases in which the device's loops write something else than the CPU's."""
    compared = [(name, compare) for name, compare in bits.comparisons(549, None) if re.fullmatch(pattern, name)]
    assert compared
    return [name for name, compare in compared if compare(torch.device("cuda"))]


@pytest.mark.gpu
class TestOnADevice:
    def test_the_bits_of_the_cpu(self) -> None:
        assert kernels._backend(torch.empty(2, device="cuda")).__name__.endswith("triton_loops")
        assert differing() == []

    def test_the_bits_of_the_cpu_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "_triton_loops", lambda: None)
        assert differing() == []
        monkeypatch.setattr(_Compiler, "warm", True)  # as after a large tensor; it takes seconds for each loop
        assert differing(r"(perturb|perturb_rows|add) bfloat16.*, 1, gaussian(, \d+)?") == []

    def test_more_than_two_to_the_31_elements(self) -> None:
        numel, tail = 2**31 + 4112, 8192  # of which one launch for several tensors can be one
        weight = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
        change = directions({"w": weight}, 0, 0, {0: 1e-2}, "gaussian")["w"]
        expected = torch.zeros(tail, dtype=torch.bfloat16)
        cpu = directions({"w": expected}, 0, 0, {0: 1e-2}, "gaussian")["w"]
        change.accumulate(weight)
        cpu.accumulate(expected, start=numel - tail)
        assert torch.equal(weight[-tail:].cpu(), expected)
        change.add_to(torch.zeros_like(weight), weight)
        assert torch.equal(weight[-tail:].cpu(), expected)
        accumulate_each([change], [weight.zero_()])
        assert torch.equal(weight[-tail:].cpu(), expected)
