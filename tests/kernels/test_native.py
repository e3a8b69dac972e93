"""The C loops give the bits of the torch loops, for every number there is, and may be missing."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zolightning.bench import bits
from zolightning.directions.dense import Direction
from zolightning.kernels import native, torch_loops
from zolightning.kernels.noise import NOISE_KINDS, NoiseKind, coefficient, key
from zolightning.optim.precision import UPDATE_PRECISIONS, add_direction, add_tensor

pytestmark = pytest.mark.skipif(not native.available(torch.empty(2)), reason="there is no C compiler")

BLOCK = 2048  # as in native.c
DTYPES = [torch.float32, torch.bfloat16]

sizes = st.one_of(
    st.integers(0, 70), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 5, 2**15 + 9])
)
coefficients = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=3)
kinds = st.sampled_from(NOISE_KINDS)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32 - 1)


def any_numbers(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Finite numbers of any bit pattern, zeros of both signs and subnormal numbers among them."""
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(integer)
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(limits.min, limits.max + 1, (numel,), generator=generator, dtype=torch.int64)
    values = bits.to(integer).view(dtype)
    values = torch.where(values.isfinite() & (values.abs() < 1e30), values, -0.0)
    values[::5], values[1::7] = -0.0, 0.0
    return values


def direction(values: list[float], kind: NoiseKind) -> Direction:
    keys = torch.tensor([key(0, 1, query, "w") for query in range(len(values))], dtype=torch.int32)
    return Direction(keys, torch.tensor([coefficient(value, kind) for value in values]), kind)


def by_c_and_by_torch(loop: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    found = loop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "available", lambda *_, **__: False)
        return found, loop()


def assert_same_bits(one: Tensor, other: Tensor) -> None:
    integer = {2: torch.int16, 4: torch.int32}[one.element_size()]
    assert torch.equal(one.view(integer), other.view(integer))


class TestSameBits:
    @given(
        sizes,
        st.sampled_from([*zip(DTYPES, DTYPES, strict=True), (torch.float32, torch.bfloat16)]),
        seeds,
        coefficients,
        kinds,
        st.sampled_from([0, 2, 2**31 - 2, 2**32 - 2**16]),
    )
    def test_perturb(
        self,
        numel: int,
        dtypes: tuple[torch.dtype, torch.dtype],
        seed: int,
        values: list[float],
        kind: NoiseKind,
        start: int,
    ) -> None:
        weight, d = any_numbers(numel, dtypes[0], seed), direction(values, kind)

        def loop() -> Tensor:
            out = torch.empty_like(weight, dtype=dtypes[1])
            d.add_to(weight, out, start)
            return out

        assert_same_bits(*by_c_and_by_torch(loop))

    @given(
        sizes,
        st.sampled_from([*zip(DTYPES, DTYPES, strict=True), (torch.float32, torch.bfloat16)]),
        seeds,
        coefficients,
        kinds,
    )
    def test_both_signs_are_those_of_negated_coefficients(
        self, numel: int, dtypes: tuple[torch.dtype, torch.dtype], seed: int, values: list[float], kind: NoiseKind
    ) -> None:
        """Opposite coefficients cancel where codes are equal: a -0 plus or minus such a sum is +0, both times."""
        weight, values = any_numbers(numel, dtypes[0], seed), [*values, *(-value for value in values[1:])]
        (plus, minus), d = torch.empty(2, numel, dtype=dtypes[1]), direction(values, kind)

        def both() -> Tensor:
            d.add_both(weight, plus, minus, 2)
            return torch.cat([plus, minus])

        expected = torch.empty(2, numel, dtype=dtypes[1])
        d.add_to(weight, expected[0], 2)
        Direction(d.keys, -d.coefficients, kind).add_to(weight, expected[1], 2)
        for found in by_c_and_by_torch(both):
            assert_same_bits(found, expected.view(-1))

    @given(st.integers(0, 9), st.integers(1, 40).map(lambda n: 2 * n), dtypes, seeds, coefficients, kinds)
    def test_rows(
        self, count: int, columns: int, dtype: torch.dtype, seed: int, values: list[float], kind: NoiseKind
    ) -> None:
        table, d = any_numbers(7 * columns, dtype, seed).view(7, columns), direction(values, kind)
        rows = torch.randint(7, (count,), generator=torch.Generator().manual_seed(seed))

        def loop() -> Tensor:
            out = torch.empty(count, columns, dtype=dtype)
            d.add_to_rows(table, rows, out)
            return out

        assert_same_bits(*by_c_and_by_torch(loop))

    @given(sizes, dtypes, seeds, coefficients, kinds, st.floats(0, 1), st.sampled_from(UPDATE_PRECISIONS))
    def test_update(
        self,
        numel: int,
        dtype: torch.dtype,
        seed: int,
        values: list[float],
        kind: NoiseKind,
        decay: float,
        precision: Any,
    ) -> None:
        start, d = any_numbers(numel, dtype, seed), direction(values, kind)

        def loop() -> Tensor:
            weight, state = start.clone(), {}
            for _ in range(2):
                add_direction(weight, state, d, precision, decay)
            return torch.cat([weight, *(low.view(torch.int8).to(dtype) for low in state.values())])

        assert_same_bits(*by_c_and_by_torch(loop))

    @given(
        sizes,
        seeds,
        st.floats(0, 1),
        st.integers(0, 3),
        st.sampled_from([1.0, -3e-3]),
        st.sampled_from([("exact", "low_word", torch.int16), ("low_byte", "low_byte", torch.int8), None]),
        dtypes,
    )
    def test_update_by_numbers_at_hand(
        self,
        numel: int,
        seed: int,
        decay: float,
        first: int,
        scale: float,
        kept: tuple[Any, str, torch.dtype] | None,
        dtype: torch.dtype,
    ) -> None:
        """Of a part of a weight, whose extra bits are anything: somebody else may have written the weight."""
        dtype = dtype if kept is None else torch.bfloat16
        start, delta = any_numbers(first + numel, dtype, seed), any_numbers(numel, torch.float32, seed + 1)
        precision, name, extra_bits = kept or ("native", "", torch.int8)
        low = torch.randint(-(2**15), 2**15, start.shape, dtype=torch.int16).to(extra_bits)

        def loop() -> Tensor:
            weight, state = start.clone(), {name: low.clone()} if kept else {}
            add_tensor(weight, state, delta, precision, decay, first, scale)
            return torch.cat([weight, *(low.view(torch.int8).to(dtype) for low in state.values())])

        assert_same_bits(*by_c_and_by_torch(loop))
        assert bool(loop()[: len(start)].isfinite().all())

    @given(sizes, seeds, coefficients, kinds, st.floats(0, 1), st.sampled_from([0, 4]))
    def test_accumulate(
        self, numel: int, seed: int, values: list[float], kind: NoiseKind, decay: float, start: int
    ) -> None:
        before, d = any_numbers(numel, torch.float32, seed), direction(values, kind)

        def loop() -> Tensor:
            total = before.clone()
            d.accumulate(total, decay, start)
            return total

        assert_same_bits(*by_c_and_by_torch(loop))

    def test_all_loops_in_short(self) -> None:
        """Shaped noise and curvature, too. The torch loops have no masters: they are added to as fp32 weights are."""
        cases = bits.comparisons(549, None, torch_loops)
        differing = [name for name, compare in cases if "add float16, float32" not in name and compare(bits.CPU)]
        assert differing == []

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_any_number_of_threads(self, dtype: torch.dtype) -> None:
        weight, results, threads = any_numbers(2**17 + 3, dtype, 0), [], torch.get_num_threads()
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                out = torch.empty_like(weight)
                direction([0.5, -2.0], "gaussian").add_to(weight, out)
                results.append(out)
        finally:
            torch.set_num_threads(threads)
        assert_same_bits(*results)


class TestAvailable:
    def test_where_it_is_made_for(self) -> None:
        assert native.available(torch.empty(3)) and native.available(torch.empty(3).bfloat16(), start=4)
        assert not native.available(torch.empty(3), start=1)  # pairs of elements share a hash
        assert not native.available(torch.empty(3).half()) and not native.available(torch.empty(3).double())
        assert not native.available(torch.empty(3, device="meta"))


@pytest.fixture
def fresh() -> Iterator[None]:
    native._library.cache_clear()
    yield
    native._library.cache_clear()


def compiler(folder: Path, script: str) -> str:
    """A command that compiles as `script`, of a shell, does."""
    path = folder / "cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.usefixtures("fresh")
class TestLibrary:
    def test_it_is_made_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ZOLIGHTNING_CACHE", str(tmp_path))
        assert native.available(torch.empty(2))
        (library,) = (tmp_path / "native").iterdir()
        native._library.cache_clear()
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
        assert native.available(torch.empty(2)) and library.exists()

    def test_an_empty_name_of_a_cache_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("ZOLIGHTNING_CACHE", "")
        assert native.available(torch.empty(2))
        assert len(list((tmp_path / ".cache/zolightning/native").iterdir())) == 1

    @pytest.mark.parametrize("flag", ["-D", pytest.param("-U", marks=pytest.mark.slow)])
    def test_with_and_without_an_instruction_that_counts_bits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
    ) -> None:
        monkeypatch.setenv("ZOLIGHTNING_CACHE", str(tmp_path))
        monkeypatch.setattr(native, "_FLAGS", [*native._FLAGS, f"{flag}__AVX512VPOPCNTDQ__"])
        weight, d = any_numbers(BLOCK + 3, torch.bfloat16, 0), direction([0.5, -2.0], "gaussian")

        def loop() -> Tensor:
            out = torch.empty_like(weight)
            d.add_to(weight, out)
            return out

        assert_same_bits(*by_c_and_by_torch(loop))
        assert len(list((tmp_path / "native").iterdir())) == 1

    def test_it_may_be_switched_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ZOLIGHTNING_NATIVE", "0")
        assert not native.available(torch.empty(2))

    @pytest.mark.parametrize("missing", ["compiler", "folder"])
    def test_without_it_torch_does_the_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
    ) -> None:
        weight, out, expected = torch.ones(5), torch.empty(5), torch.empty(5)
        direction([0.5], "gaussian").add_to(weight, expected)
        native._library.cache_clear()
        monkeypatch.setenv("ZOLIGHTNING_CACHE", str(tmp_path / "cache"))
        if missing == "compiler":
            monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
        else:
            (tmp_path / "cache").write_text("a file where a folder should be")
        with pytest.warns(UserWarning, match=r"could not be compiled \(.*many times slower.*ZOLIGHTNING_CACHE"):
            direction([0.5], "gaussian").add_to(weight, out)
        assert torch.equal(out, expected)
        direction([0.5], "gaussian").add_to(weight, out)  # a second warning would be an error

    def test_a_compiler_that_fails_is_quoted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ZOLIGHTNING_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("CC", compiler(tmp_path, "echo 'fatal error: no such flag' >&2; exit 1"))
        with pytest.warns(UserWarning, match="fatal error: no such flag"):
            assert not native.available(torch.empty(2))
        assert not list((tmp_path / "cache").rglob("*.so"))

    @pytest.mark.parametrize(
        ("script", "reason"),
        [
            (
                'case "$*" in *-fopenmp*) echo "unsupported option \'-fopenmp\'" >&2; exit 1;; esac',
                "unsupported option",
            ),
            (  # compiles what needs a function that torch does not bring
                'case "$*" in *-fopenmp*) for out; do :; done;'
                " echo 'void absent(void); void f(void) { absent(); }' | gcc -fPIC -x c -c - -o $out; exit;; esac",
                "undefined symbol: absent",
            ),
        ],
        ids=["refused", "another"],
    )
    def test_without_the_openmp_of_torch_it_runs_on_one_thread(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
    ) -> None:
        monkeypatch.setenv("ZOLIGHTNING_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("CC", compiler(tmp_path, f'{script}\nexec gcc "$@"'))
        weight, d = any_numbers(2**16, torch.bfloat16, 0), direction([0.5, -2.0], "gaussian")

        def loop() -> Tensor:
            out = torch.empty_like(weight)
            d.add_to(weight, out)
            return out

        with pytest.warns(UserWarning, match=f"run on one thread.*{reason}"):
            assert native.available(weight)
        assert_same_bits(*by_c_and_by_torch(loop))

    def test_a_compiler_may_be_several_words(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ZOLIGHTNING_CACHE", str(tmp_path))
        monkeypatch.setenv("CC", "env LANG=C gcc")
        assert native.available(torch.empty(2))
