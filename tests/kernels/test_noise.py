"""Noise is a pure function of integers: known values, an independent restatement of it, and its statistics."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import zolightning.kernels.noise
from zolightning.kernels.noise import (
    CODE_SCALE,
    NOISE_KINDS,
    NoiseKind,
    codes,
    coefficient,
    hash_bits,
    key,
    start_of,
)

# A run's checkpoint and its records are only worth something as long as these never change.
_DOCUMENT = Path(zolightning.kernels.noise.__file__).parents[1] / "README.md"


def _vectors() -> list[tuple[Any, ...]]:
    """(seed, step, query, name), the key, and the codes of the first eight elements, from the published table."""
    rows = re.findall(r"^\| (\d+), (\d+), (\d+), `(.+?)` \| (.+?) \| (.+?) \| (.+?) \|$", _DOCUMENT.read_text(), re.M)
    return [
        ((int(seed), int(step), int(query), name), *(tuple(map(int, cell.split(","))) for cell in cells))
        for seed, step, query, name, *cells in rows
    ]


VECTORS = _vectors()

words = st.integers(-(2**31), 2**31 - 1)
kinds = st.sampled_from(NOISE_KINDS)


def indices(start: int, count: int) -> Tensor:
    """int32 counters, wrapped."""
    return torch.tensor([(start + i + 2**31) % 2**32 - 2**31 for i in range(count)], dtype=torch.int32)


def reference_code(index: int, key: tuple[int, int], kind: str) -> int:
    """The definition, in Python's integers and from the text of the module's docstring alone."""
    mask = 2**32 - 1
    bits = (index // 2 * 0x9E3779B1 & mask) ^ (key[0] & mask)
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & mask
    bits = ((bits ^ (bits >> 15)) + key[1]) & mask
    bits = (bits * 0x846CA68B) & mask
    bits ^= bits >> 16
    half = bits >> 16 if index % 2 else bits & 0xFFFF
    return half.bit_count() - 8 if kind == "gaussian" else 1 - 2 * (half >> 15)


class TestDefinition:
    def test_the_table_is_published(self) -> None:
        assert len(VECTORS) >= 3

    @pytest.mark.parametrize(("arguments", "expected_key", "gaussian", "rademacher"), VECTORS)
    def test_known_values(
        self,
        arguments: tuple[int, int, int, str],
        expected_key: tuple[int, int],
        gaussian: tuple[int, ...],
        rademacher: tuple[int, ...],
    ) -> None:
        assert key(*arguments) == expected_key
        words = torch.tensor(expected_key, dtype=torch.int32)
        assert codes(indices(0, 8), words, "gaussian").tolist() == list(gaussian)
        assert codes(indices(0, 8), words, "rademacher").tolist() == list(rademacher)

    @given(start=st.integers(0, 2**32 - 16), key=st.tuples(words, words), kind=kinds)
    def test_equals_its_restatement(self, start: int, key: tuple[int, int], kind: NoiseKind) -> None:
        found = codes(indices(start, 16), torch.tensor(key, dtype=torch.int32), kind).tolist()
        assert found == [reference_code(start + i, key, kind) for i in range(16)]

    @pytest.mark.parametrize("start", [2**31 - 8, 2**32 - 16])
    def test_the_counter_wraps_without_a_seam(self, start: int) -> None:
        words = torch.tensor(key(0, 0, 0, "wide"), dtype=torch.int32)
        counted = torch.arange(16, dtype=torch.int32) + start_of(start, torch.device("cpu"))
        assert codes(counted, words, "gaussian").tolist() == [
            reference_code(start + i, key(0, 0, 0, "wide"), "gaussian") for i in range(16)
        ]

    @given(value=st.floats(-1e30, 1e30), kind=kinds)
    def test_a_coefficient_times_a_code_is_exact_in_fp32(self, value: float, kind: NoiseKind) -> None:
        rounded = coefficient(value, kind)
        # 20 bits: off by at most half a unit in the last place, that is 2^-20 relative.
        assert abs(rounded - value * CODE_SCALE[kind]) <= 2**-20 * abs(value * CODE_SCALE[kind])
        for code in range(-8, 9) if abs(value) > 1e-30 else ():  # below lie fp32's subnormal numbers
            product = torch.tensor(rounded, dtype=torch.float32) * code
            assert product.item() == rounded * code

    @given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.sampled_from("ab"))))
    def test_each_argument_changes_the_key(self, arguments: list[tuple[int, int, int, str]]) -> None:
        assert len({key(*a) for a in arguments}) == len(set(arguments))

    def test_torch_generators_are_neither_read_nor_written(self) -> None:
        words = torch.tensor(key(0, 0, 0, "w"), dtype=torch.int32)
        first = codes(indices(0, 64), words, "gaussian")
        torch.manual_seed(1)
        before = torch.get_rng_state()
        assert torch.equal(codes(indices(0, 64), words, "gaussian"), first)
        assert torch.equal(torch.get_rng_state(), before)


KEYS = 64
ELEMENTS = 2**16

# Probability of each code. Gaussian: 16 fair bits counted.
PROBABILITIES = {
    "gaussian": {k - 8: math.comb(16, k) / 2**16 for k in range(17)},
    "rademacher": {-1: 0.5, 1: 0.5},
}


def expectation(function: Callable[[float], float], kind: str) -> float:
    return sum(p * function(code * CODE_SCALE[kind]) for code, p in PROBABILITIES[kind].items())


def sample(index: int, kind: NoiseKind, seed: int = 0, step: int = 0, query: int = 0, name: str = "w") -> Tensor:
    """A direction of unit variance in float64; `index` numbers the trials of a test."""
    words = torch.tensor(key(1000 + index * 17 + seed, step, query, name), dtype=torch.int32)
    return codes(torch.arange(ELEMENTS, dtype=torch.int32), words, kind).double() * CODE_SCALE[kind]


def assert_standard_normal(scores: Tensor) -> None:
    """Checks z-scores of independent trials, each nearly standard normal by the central limit theorem.

    The sum of squares of K scores is chi-square with mean K and variance 2 K: 5 standard deviations. A single score
    beyond 5.5 has a probability of 4e-8.
    """
    count = scores.numel()
    assert abs((scores**2).sum().item() - count) < 5 * math.sqrt(2 * count)
    assert abs(scores.sum().item()) < 5 * math.sqrt(count)
    assert scores.abs().max() < 5.5


@pytest.mark.parametrize("kind", NOISE_KINDS)
class TestStatistics:
    def test_exact_moments_of_the_distribution(self, kind: NoiseKind) -> None:
        assert expectation(lambda z: z, kind) == 0
        assert expectation(lambda z: z**2, kind) == 1
        assert expectation(lambda z: z**3, kind) == 0
        assert expectation(lambda z: z**4, kind) == (3 - 1 / 8 if kind == "gaussian" else 1)

    @pytest.mark.parametrize("power", [1, 2, 3, 4])
    def test_sample_moments(self, kind: NoiseKind, power: int) -> None:
        mean = expectation(lambda z: z**power, kind)
        variance = expectation(lambda z: z ** (2 * power), kind) - mean**2
        moments = torch.stack([(sample(i, kind) ** power).mean() for i in range(KEYS)])
        if variance == 0:  # even powers of +1 and -1
            assert torch.equal(moments, torch.full_like(moments, mean))
        else:
            # The mean of n independent draws has variance `variance / n`.
            assert_standard_normal((moments - mean) / math.sqrt(variance / ELEMENTS))

    def test_frequencies_of_all_codes(self, kind: NoiseKind) -> None:
        # Counts over n = 64 * 65536 draws are binomial: mean n p, variance n p (1 - p).
        drawn = torch.cat([sample(i, kind) for i in range(KEYS)]) / CODE_SCALE[kind]
        for code, p in PROBABILITIES[kind].items():
            count = (drawn == code).sum().item()
            expected = len(drawn) * p
            assert abs(count - expected) < 5 * math.sqrt(expected * (1 - p)), code

    @pytest.mark.parametrize("lag", [1, 2, 3, 7, 64, 255, 256, 768, 1024, 4096, 4097, 2**15])
    def test_elements_are_uncorrelated(self, kind: NoiseKind, lag: int) -> None:
        # Products of independent elements have mean 0 and variance 1 and are uncorrelated among themselves.
        scores = []
        for i in range(KEYS):
            z = sample(i, kind)
            products = z[:-lag] * z[lag:]
            scores.append(products.mean() * math.sqrt(len(products)))
        assert_standard_normal(torch.stack(scores))

    def test_the_two_halves_of_a_hash_are_uncorrelated(self, kind: NoiseKind) -> None:
        scores = [(z[0::2] * z[1::2]).mean() * math.sqrt(ELEMENTS // 2) for z in (sample(i, kind) for i in range(KEYS))]
        assert_standard_normal(torch.stack(scores))

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ({"seed": 0}, {"seed": 1}),
            ({"step": 0}, {"step": 1}),
            ({"step": 5}, {"step": 6}),
            ({"query": 0}, {"query": 1}),
            ({"name": "layers.0.weight"}, {"name": "layers.1.weight"}),
        ],
    )
    def test_directions_are_uncorrelated(self, kind: NoiseKind, one: dict, other: dict) -> None:
        scores: dict[int, list[Tensor]] = {0: [], 1: [], 2: [], 1024: []}
        for i in range(KEYS):
            z, w = sample(i, kind, **one), sample(i, kind, **other)
            for lag, found in scores.items():
                products = z[: ELEMENTS - lag] * w[lag:]
                found.append(products.mean() * math.sqrt(len(products)))
        for found in scores.values():
            assert_standard_normal(torch.stack(found))


@pytest.mark.parametrize("lag", [1, 2, 1024])
def test_magnitudes_are_uncorrelated(lag: int) -> None:
    # (z^2 - 1) has variance E z^4 - 1, so products of two of them have its square.
    spread = expectation(lambda z: z**4, "gaussian") - 1
    scores = []
    for i in range(KEYS):
        squares = sample(i, "gaussian") ** 2 - 1
        products = squares[:-lag] * squares[lag:]
        scores.append(products.mean() * math.sqrt(len(products)) / spread)
    assert_standard_normal(torch.stack(scores))


def test_every_input_bit_changes_half_of_the_hash() -> None:
    # Avalanche: each output bit flips for half of n = 65536 indices, with a standard deviation of 1 / (2 sqrt(n)),
    # which is 0.002: 6 of them.
    words = torch.tensor(key(0, 0, 0, "w"), dtype=torch.int32)
    index = torch.arange(ELEMENTS, dtype=torch.int32)
    bits = hash_bits(index, words)
    for position in range(31):
        flipped = bits ^ hash_bits(index ^ (1 << position), words)
        changed = torch.stack([(flipped >> i) & 1 for i in range(32)]).double().mean(1)
        assert (changed - 0.5).abs().max() < 0.012, position
