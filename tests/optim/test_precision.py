"""Updates that are not lost in half precision."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zolightning.directions.dense import Direction, compute_dtype
from zolightning.kernels import native
from zolightning.kernels.bfloat16 import read_split, write_split
from zolightning.kernels.noise import NoiseKind, coefficient, key
from zolightning.optim.precision import (
    UPDATE_PRECISIONS,
    add_direction,
    add_tensor,
    as_contiguous,
    state_bytes,
)
from zolightning.optim.stochastic_rounding import round_stochastically

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=["c", "torch"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the C loops, where they can be made, and with those of torch."""
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda *_, **__: False)


def direction(
    step: int, rms: float, dtype: torch.dtype = torch.float32, num_queries: int = 1, kind: NoiseKind = "gaussian"
) -> Direction:
    keys = torch.tensor([key(0, step, query, "w") for query in range(num_queries)], dtype=torch.int32)
    values = [coefficient(rms / num_queries**0.5, kind)] * num_queries
    return Direction(keys, torch.tensor(values, dtype=compute_dtype(dtype)), kind)


def start(numel: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(numel, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().to(dtype)


def bits(values: Tensor) -> Tensor:
    """fp32 numbers as integers: told apart are also zeros of different sign."""
    return values.view(torch.int32)


class TestSplit:
    @given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1))
    def test_writing_loses_no_bit(self, patterns: list[int]) -> None:
        value = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
        value = value[value.isfinite()]
        weight, low = torch.empty_like(value, dtype=torch.bfloat16), torch.empty_like(value, dtype=torch.int16)
        write_split(weight, low, value)
        assert torch.equal(bits(read_split(weight, low)), bits(value))

    @given(st.floats(-(2.0**100), 2.0**100, width=32))
    def test_the_weight_is_the_nearest_bf16_number(self, number: float) -> None:
        value = torch.tensor([number])
        weight, low = value.bfloat16(), torch.zeros(1, dtype=torch.int16)
        error = (weight.double() - value.double()).abs()
        write_split(weight, low, value)
        assert (weight.double() - value.double()).abs() == error

    @given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1))
    def test_with_a_low_byte_it_is_the_nearest_number_of_24_bits(self, numbers: list[float]) -> None:
        """The even one where two are as near."""
        value = torch.tensor(numbers)
        weight, low = torch.empty_like(value, dtype=torch.bfloat16), torch.empty_like(value, dtype=torch.int8)
        write_split(weight, low, value)
        found, down = read_split(weight, low), (bits(value) & -0x100).view(torch.float32)
        up = ((bits(value) & -0x100) + 0x100).view(torch.float32)
        errors = [(number.double() - value.double()).abs() for number in (found, down, up)]
        assert torch.equal(errors[0], torch.minimum(errors[1], errors[2]))
        tied = errors[1] == errors[2]
        assert not (bits(found)[tied] & 0x100).any()
        assert torch.equal(bits(found) & 0xFF, torch.zeros_like(low, dtype=torch.int32))

    @pytest.mark.parametrize("extra_bits", [torch.int16, torch.int8])
    def test_without_extra_bits_it_is_the_weight(self, extra_bits: torch.dtype) -> None:
        weight = start(100, torch.bfloat16)
        assert torch.equal(read_split(weight, torch.zeros(100, dtype=extra_bits)), weight.float())

    @pytest.mark.parametrize("extra_bits", [torch.int16, torch.int8])
    def test_every_nan_stays_one(self, extra_bits: torch.dtype) -> None:
        value = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
        weight, low = torch.empty(4, dtype=torch.bfloat16), torch.empty(4, dtype=extra_bits)
        write_split(weight, low, value)
        assert weight.isnan().all() and read_split(weight, low).isnan().all()


@pytest.mark.usefixtures("loops")
class TestExact:
    """The fp32 trajectory, in every dtype."""

    @pytest.mark.parametrize("numel", [1, 2, 7, 64, 65])
    @pytest.mark.parametrize("decay", [1.0, 1 - 1e-4])
    @pytest.mark.parametrize("offset", [0, 1])
    @pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
    def test_bf16_follows_fp32_bit_for_bit(self, numel: int, decay: float, offset: int, kind: NoiseKind) -> None:
        wide, state = start(numel, torch.float32), {}
        buffer = torch.zeros(numel + 2, dtype=torch.bfloat16)
        half = buffer[offset : offset + numel]
        half.copy_(wide)
        for step in range(20):
            d = direction(step, 1e-5, num_queries=2, kind=kind)
            add_direction(wide, {}, d, "exact", decay)
            add_direction(half, state, d, "exact", decay)
            dense = torch.randn(numel, generator=torch.Generator().manual_seed(step)) * 1e-5
            for part in (slice(0, numel // 2), slice(numel // 2, numel)):
                add_tensor(wide, {}, dense[part], "exact", decay, part.start)
                add_tensor(half, state, dense[part], "exact", decay, part.start)
            assert torch.equal(bits(read_split(half, state["low_word"])), bits(wide))
            # The bf16 weight is the fp32 one, rounded; a cast breaks ties otherwise, half a unit apart.
            assert ((half.float() - wide).abs() <= (wide.bfloat16().float() - wide).abs()).all()
        assert not buffer[:offset].any() and not buffer[offset + numel :].any()

    @pytest.mark.parametrize("numel", [1, 7, 64])
    @pytest.mark.parametrize("decay", [1.0, 1 - 1e-4])
    def test_fp16_follows_its_fp32_master(self, numel: int, decay: float) -> None:
        wide, half, state = start(numel, torch.float32), start(numel, torch.float16), {}
        assert torch.equal(wide.half(), half)
        wide = half.float()
        for step in range(20):
            add_direction(wide, {}, direction(step, 1e-5), "exact", decay)
            add_direction(half, state, direction(step, 1e-5), "exact", decay)
            dense = torch.randn(numel, generator=torch.Generator().manual_seed(step)) * 1e-5
            for part in (slice(0, numel // 2), slice(numel // 2, numel)):
                add_tensor(wide, {}, dense[part], "exact", decay, part.start)
                add_tensor(half, state, dense[part], "exact", decay, part.start)
            assert torch.equal(bits(state["master"]), bits(wide))
            assert torch.equal(half, wide.half())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_wide_weights_need_no_state(self, dtype: torch.dtype) -> None:
        exact, native, state = start(33, dtype), start(33, dtype), {}
        add_direction(exact, state, direction(0, 1e-5, dtype), "exact", 0.99)
        add_direction(native, state, direction(0, 1e-5, dtype), "native", 0.99)
        assert torch.equal(exact, native) and not state


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("how", ["direction", "tensor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_somebody_else_writes_is_where_the_next_update_starts(dtype: torch.dtype, how: str) -> None:
    """A clamp, zeros and an average between two updates; low words of both signs are at hand."""
    d, zeros = direction(1, 1e-3), torch.zeros(64)
    weight, state = start(64, dtype), {}
    add_direction(weight, state, direction(0, 1e-3), "exact")
    kept = state["master"].clone() if dtype == torch.float16 else None
    weight[:8], weight[8:16] = 0.0, -0.0
    weight[16:32].clamp_(-0.01, 0.01)
    weight[32:48].lerp_(torch.full((16,), 0.5, dtype=dtype), 0.1)
    written = weight.float()
    change = zeros.clone()
    d.accumulate(change)
    if how == "direction":
        add_direction(weight, state, d, "exact")
    else:
        for part in (slice(0, 20), slice(20, 64)):
            add_tensor(weight, state, change[part], "exact", start=part.start)
    if kept is not None:
        kept[:48] = torch.where(written[:48] != kept[:48].half(), written[:48], kept[:48])
        assert torch.equal(state["master"], kept + change)
        assert torch.equal(weight, (kept + change).half())
        return
    found, expected = read_split(weight, state["low_word"]), written + change
    half_a_unit = 2.0**-8 * written.abs()  # at the largest, of numbers with 8 significant bits
    assert (found - expected).abs().le(half_a_unit + 1e-9).all()


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_rounds_the_sum_as_a_cast_does(dtype: torch.dtype) -> None:
    weight, noise, dense, state = start(33, dtype), torch.zeros(33, dtype=compute_dtype(dtype)), start(33, dtype), {}
    d = direction(0, 1e-2, dtype, num_queries=3)
    d.accumulate(noise)
    factor = torch.tensor(0.9, dtype=compute_dtype(dtype))
    expected = (factor * weight.to(noise.dtype) + noise).to(dtype)
    add_direction(weight, state, d, "native", 0.9)
    assert torch.equal(weight, expected)
    expected = (factor * weight.to(noise.dtype) + dense.to(noise.dtype)).to(dtype)
    add_tensor(weight, state, dense.to(noise.dtype), "native", 0.9)
    assert torch.equal(weight, expected) and not state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", UPDATE_PRECISIONS)
def test_state_bytes_says_what_is_kept(dtype: torch.dtype, precision: str) -> None:
    weight, state = start(50, dtype), {}
    add_direction(weight, state, direction(0, 1e-3, dtype), precision)
    kept = sum(extra_bits.numel() * extra_bits.element_size() for extra_bits in state.values())
    assert kept == 50 * state_bytes(dtype, precision)


@pytest.mark.parametrize(
    ("precision", "least", "most"),
    [("exact", 0.97, 1.03), ("low_byte", 0.95, 1.03), ("native", 0.0, 0.2)],
)
def test_how_much_of_many_small_bf16_updates_is_realised(precision: str, least: float, most: float) -> None:
    """The share of the intended displacement along itself, as the weights are read, after 5,000 updates of RMS 1e-6.

    The intended displacement is a random walk of RMS 7e-5. Exact updates begin in the middle of a run, with low words
    spread evenly: what rounding adds is then independent of the displacement, of RMS 1e-4 at most, and changes the
    projection on 65,536 elements by 1e-4 / 7e-5 / 256 = 0.6 %.
    """
    numbers = torch.randn(2**16, generator=torch.Generator().manual_seed(0)) * 0.02
    weight, state = numbers.bfloat16(), {}
    if precision != "native":
        name, dtype = {"exact": ("low_word", torch.int16), "low_byte": ("low_byte", torch.int8)}[precision]
        state[name] = torch.zeros(2**16, dtype=dtype)
        write_split(weight, state[name], numbers)
    before, intended = weight.double(), torch.zeros(2**16)
    for step in range(5_000):
        d = direction(step, 1e-6)
        add_direction(weight, state, d, precision)
        d.accumulate(intended)
    moved = weight.double() - before
    share = (moved @ intended.double()) / (intended.double() @ intended.double())
    assert least <= share <= most


class TestPacked:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_layouts_other_than_contiguous_are_written_back(self, dtype: torch.dtype) -> None:
        images = torch.nn.Parameter(torch.zeros(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last))
        transposed = torch.nn.Parameter(torch.zeros(3, 4, dtype=dtype).t())
        for parameter in (images, transposed):
            strides, values = parameter.stride(), torch.arange(parameter.numel()).view(parameter.shape).to(dtype)
            with as_contiguous(parameter) as weight:
                assert weight.is_contiguous()
                weight.copy_(values)
            assert torch.equal(parameter.detach(), values) and parameter.stride() == strides

    def test_contiguous_data_is_not_copied(self) -> None:
        parameter = torch.nn.Parameter(torch.zeros(3, 4))
        with as_contiguous(parameter) as weight:
            assert weight.data_ptr() == parameter.data_ptr()


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "exact"), (torch.bfloat16, "low_byte"), (torch.float16, "exact")]
)
def test_stochastic_rounding_keeps_the_mean(dtype: torch.dtype, precision: str) -> None:
    """What lies a quarter of the spacing above a number becomes the next one in a quarter of all cases."""
    low = torch.tensor([0.02, -3.0, 1e-3, 0.0, 2.0**-14]).to(dtype).repeat_interleave(100_000)
    spacing = ((low.abs().view(torch.int16) + 1).view(dtype) - low.abs()).float()
    weight, extra_bits = low.clone(), {}
    add_tensor(weight, extra_bits, spacing * low.sign() / 4, precision)
    assert torch.equal(weight, low)
    round_stochastically(weight, extra_bits, precision, key(0, 3, -1, "weight"))
    moved = (weight.float() - low.float()).abs() / spacing
    assert set(moved.unique().tolist()) <= {0.0, 1.0}
    # Binomials of 100,000: standard deviation 0.0014
    assert moved.view(5, -1).mean(1).tolist() == pytest.approx([0.25, 0.25, 0.25, 0, 0.25], abs=0.006)
