"""Compiled and eager torch loops give the same bits, and a failing torch.compile costs only time."""

import runpy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zolightning.directions.dense import Direction
from zolightning.kernels import compiled, native
from zolightning.kernels.compiled import CHUNK, COMPILE_FROM, _Compiler, chunk_size, chunks, kernel
from zolightning.kernels.noise import NoiseKind, coefficient, key
from zolightning.optim.precision import add_direction


@pytest.fixture(autouse=True)
def without_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda *_, **__: False)


def direction(num_queries: int = 1, kind: NoiseKind = "gaussian") -> Direction:
    keys = torch.tensor([key(5, 6, query, "big") for query in range(num_queries)], dtype=torch.int32)
    return Direction(keys, torch.tensor([coefficient(1e-3 * (q + 1.7), kind) for q in range(num_queries)]), kind)


def weights(numel: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(1)) * 0.02
    values[:1000] *= 1e-37  # subnormal numbers, which fast-math modes flush to zero
    return values.to(dtype)


def perturb(dtype: torch.dtype, numel: int) -> Tensor:
    out = torch.empty(numel, dtype=dtype)
    direction().add_to(weights(numel, dtype), out)
    return out


def update(dtype: torch.dtype, numel: int) -> Tensor:
    weight, state = weights(numel, dtype), {}
    add_direction(weight, state, direction(2), "exact", decay=1 - 3e-7)
    return torch.cat([weight.double(), *(extra_bits.double() for extra_bits in state.values())])


class TestCompiled:
    @pytest.mark.parametrize(
        ("loop", "dtype"),
        [
            pytest.param(perturb, torch.float32, marks=pytest.mark.slow),
            (update, torch.bfloat16),
            pytest.param(perturb, torch.bfloat16, marks=pytest.mark.slow),
            pytest.param(update, torch.float32, marks=pytest.mark.slow),
            pytest.param(perturb, torch.float16, marks=pytest.mark.slow),
            pytest.param(update, torch.float16, marks=pytest.mark.slow),
        ],
    )
    def test_the_same_bits_as_eager(
        self, loop: Callable[..., Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        numel = 2 * COMPILE_FROM + 3 * CHUNK // 2  # in pairs, too, above the limit, and no multiple of a chunk
        before = torch.get_rng_state()
        compiled = loop(dtype, numel)
        assert _Compiler.enabled and _Compiler.warm, "nothing was compiled"
        assert torch.equal(torch.get_rng_state(), before)
        monkeypatch.setattr(_Compiler, "enabled", False)
        assert torch.equal(loop(dtype, numel), compiled)

    def test_small_tensors_wait_until_something_was_compiled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small, large = torch.empty(10), torch.empty(COMPILE_FROM)
        assert kernel(perturb, small) == (perturb, CHUNK)
        assert kernel(perturb, large.to("meta")) == (perturb, 2**30)
        assert kernel(perturb, large)[0] is not perturb
        monkeypatch.setattr(_Compiler, "warm", True)
        assert kernel(perturb, small)[0] is not perturb


def test_a_device_gets_chunks_worth_a_launch() -> None:
    assert chunk_size(torch.empty(2)) == CHUNK
    assert chunk_size(SimpleNamespace(device=torch.device("cuda"))) == compiled.DEVICE_CHUNK > CHUNK


class TestFallback:
    def test_a_failing_compiler_warns_once_and_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(function: Callable[..., None]) -> Callable[..., None]:
            def run(*args: object) -> None:
                raise RuntimeError("no C++ compiler")

            return run

        expected = perturb(torch.float32, CHUNK)
        monkeypatch.setattr(compiled, "_compiled", broken)
        monkeypatch.setattr(compiled, "COMPILE_FROM", CHUNK)
        with pytest.warns(UserWarning, match=r"not usable here \(no C\+\+ compiler\)"):
            assert torch.equal(perturb(torch.float32, CHUNK), expected)
        assert not _Compiler.enabled
        assert torch.equal(perturb(torch.float32, CHUNK), expected)  # warnings are counted: no second one

    def test_an_error_of_a_kernel_that_has_run_is_not_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def failing(function: Callable[..., None]) -> Callable[..., None]:
            def run(*args: object) -> None:
                raise RuntimeError("out of memory")

            return run

        monkeypatch.setattr(compiled, "_compiled", failing)
        monkeypatch.setattr(_Compiler, "warm", True)
        with pytest.raises(RuntimeError, match="out of memory"):
            perturb(torch.float32, 10)

    @pytest.mark.parametrize(("value", "enabled"), [(None, True), ("1", True), ("0", False)])
    def test_the_environment_switches_it_off(
        self, value: str | None, enabled: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("ZOLIGHTNING_COMPILE", raising=False)
        if value is not None:
            monkeypatch.setenv("ZOLIGHTNING_COMPILE", value)
        assert runpy.run_path(compiled.__file__)["_Compiler"].enabled is enabled


@given(numel=st.integers(0, 1000), size=st.integers(1, 1100))
def test_chunks_cover_everything_once_in_order(numel: int, size: int) -> None:
    parts = [range(numel)[part] for part in chunks(numel, size)]
    assert [i for part in parts for i in part] == list(range(numel))
    assert parts and all(min(numel, 1) <= len(part) <= size for part in parts)
