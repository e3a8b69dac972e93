"""A direction is the same wherever, however and in whatever company it is generated."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optimizer_steps import standard
from zolightning.directions.dense import Direction, compute_dtype, directions
from zolightning.directions.masked import MagnitudeMasked, Masked, RandomMask
from zolightning.directions.scaled import FullCurvature, ScaledDirection
from zolightning.kernels import compiled, native
from zolightning.kernels.noise import CODE_SCALE, NOISE_KINDS, NoiseKind, codes, coefficient, key
from zolightning.optim import MeZO
from zolightning.optim.precision import add_direction

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SCALE = 2.0**-3  # times a code of 4 bits: exact in every dtype

shapes = st.lists(st.integers(0, 7), min_size=0, max_size=3).map(tuple)
kinds = st.sampled_from(NOISE_KINDS)


@pytest.fixture(autouse=True, scope="module", params=["c", "torch"])
def loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs with the C loops, where they can be made, and with those of torch."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(native, "available", lambda *_, **__: False)
        yield


def direction(
    name: str = "w", num_queries: int = 1, kind: NoiseKind = "gaussian", dtype: torch.dtype = torch.float32
) -> Direction:
    keys = torch.tensor([key(1, 2, query, name) for query in range(num_queries)], dtype=torch.int32)
    values = [SCALE / CODE_SCALE[kind] / 2**query for query in range(num_queries)]
    return Direction(keys, torch.tensor([coefficient(v, kind) for v in values], dtype=compute_dtype(dtype)), kind)


def all_codes(count: int, kind: NoiseKind = "gaussian") -> Tensor:
    words = torch.tensor(key(1, 2, 0, "w"), dtype=torch.int32)
    return codes(torch.arange(count, dtype=torch.int32), words, kind)


def perturbed(direction: Direction, weight: Tensor, start: int = 0) -> Tensor:
    out = torch.empty_like(weight)
    direction.add_to(weight, out, start)
    return out


class TestAddTo:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", NOISE_KINDS)
    @pytest.mark.parametrize("numel", [1, 2, 33, 64])
    def test_every_dtype_gets_the_same_noise(self, dtype: torch.dtype, kind: NoiseKind, numel: int) -> None:
        noise = perturbed(direction(kind=kind, dtype=dtype), torch.zeros(numel, dtype=dtype))
        assert torch.equal(noise.double() / SCALE, all_codes(numel, kind=kind).double())

    @given(shape=shapes, seed=st.integers(0, 99), kind=kinds, dtype=st.sampled_from(DTYPES))
    def test_the_sum_is_rounded_once(self, shape: tuple, seed: int, kind: NoiseKind, dtype: torch.dtype) -> None:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        noise = all_codes(weight.numel(), kind=kind).view(shape) * SCALE
        expected = (weight.to(compute_dtype(dtype)) + noise).to(dtype)
        assert torch.equal(perturbed(direction(kind=kind, dtype=dtype), weight), expected)

    @given(numel=st.integers(0, 40), cut=st.integers(0, 40), dtype=st.sampled_from(DTYPES))
    def test_parts_equal_the_whole(self, numel: int, cut: int, dtype: torch.dtype) -> None:
        weight = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
        d = direction(dtype=dtype, num_queries=2)
        parts = [perturbed(d, weight[:cut].clone()), perturbed(d, weight[cut:].clone(), start=min(cut, numel))]
        assert torch.equal(torch.cat(parts), perturbed(d, weight))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("chunk", [2, 6, 7, 64])
    def test_any_chunk_size(self, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = torch.randn(40, generator=torch.Generator().manual_seed(0)).to(dtype)
        whole = perturbed(direction(dtype=dtype), weight)
        monkeypatch.setattr(compiled, "CHUNK", chunk)
        assert torch.equal(perturbed(direction(dtype=dtype), weight), whole)

    @given(numel=st.integers(1, 40), offset=st.integers(0, 3), out_offset=st.integers(0, 3))
    def test_bf16_weights_that_begin_anywhere_in_a_buffer(self, numel: int, offset: int, out_offset: int) -> None:
        values = torch.randn(numel, generator=torch.Generator().manual_seed(0)).bfloat16()
        expected = perturbed(direction(), values)
        buffer, out = torch.zeros(numel + 4, dtype=torch.bfloat16), torch.zeros(numel + 4, dtype=torch.bfloat16)
        buffer[offset : offset + numel] = values
        direction().add_to(buffer[offset : offset + numel], out[out_offset : out_offset + numel])
        assert torch.equal(out[out_offset : out_offset + numel], expected)
        assert not out[:out_offset].any() and not out[out_offset + numel :].any()

    @given(bits=st.lists(st.integers(0, 2**16 - 1), min_size=2, max_size=2), coefficient=st.floats(-1e4, 1e4, width=32))
    def test_bf16_sums_are_rounded_as_a_cast_does(self, bits: list[int], coefficient: float) -> None:
        weight = torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        words = torch.tensor([key(1, 2, 0, "w")], dtype=torch.int32)
        d = Direction(words, torch.tensor([coefficient]), "gaussian")
        expected = (weight.float() + torch.tensor(coefficient) * all_codes(2)).bfloat16()
        assert torch.equal(perturbed(d, weight).nan_to_num(7.0), expected.nan_to_num(7.0))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_counter_passes_two_to_the_31(self, dtype: torch.dtype) -> None:
        start = 2**31 - 8
        noise = perturbed(direction(), torch.zeros(16, dtype=dtype), start)
        words = torch.tensor(key(1, 2, 0, "w"), dtype=torch.int32)
        index = torch.arange(start, start + 16).to(torch.int32)
        assert torch.equal(noise / SCALE, codes(index, words, "gaussian").to(dtype))

    def test_scalars(self) -> None:
        assert perturbed(direction(), torch.tensor(1.0)) == 1 + SCALE * all_codes(1).item()


def test_which_directions_are_opposites() -> None:
    """Of what the host knows: not of tensors, for which it would wait."""

    def draw(signs: tuple[int, int], step: int = 0, kind: NoiseKind = "gaussian") -> Direction:
        coefficients = {query: sign * 1e-3 for query, sign in enumerate(signs)}
        return directions({"w": torch.zeros(4)}, 0, step, coefficients, kind)["w"]

    plus = draw((1, -2))
    assert plus.is_opposite(draw((-1, 2)))
    others = [plus, draw((-1, -2)), draw((-1, 2), step=1), draw((-1, 2), kind="rademacher"), None]
    assert not any(plus.is_opposite(other) for other in others)
    assert not plus.is_opposite(Direction(plus.keys, -plus.coefficients, plus.kind))


class TestAddToRows:
    @given(
        rows=st.lists(st.integers(0, 8), max_size=20),
        columns=st.integers(1, 9),
        dtype=st.sampled_from(DTYPES),
        index_dtype=st.sampled_from([torch.int64, torch.int32]),
    )
    def test_rows_of_the_perturbed_table(
        self, rows: list[int], columns: int, dtype: torch.dtype, index_dtype: torch.dtype
    ) -> None:
        table = torch.randn(9, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
        index = torch.tensor(rows, dtype=index_dtype)
        out = torch.empty(len(rows), columns, dtype=dtype)
        direction(dtype=dtype).add_to_rows(table, index, out)
        assert torch.equal(out, perturbed(direction(dtype=dtype), table)[index.long()])

    @pytest.mark.parametrize("chunk", [1, 4, 10])
    def test_any_chunk_size(self, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        table, rows = torch.randn(9, 3), torch.tensor([8, 0, 3, 3, 1])
        monkeypatch.setattr(compiled, "CHUNK", chunk)
        out = torch.empty(5, 3)
        direction().add_to_rows(table, rows, out)
        assert torch.equal(out, perturbed(direction(), table)[rows])

    def test_rows_beyond_element_two_to_the_31(self) -> None:
        rows, columns = 60_001, 40_000  # 2.4e9 elements, of which one is stored
        table = torch.zeros(1).expand(rows, columns)
        out = torch.empty(2, columns)
        direction().add_to_rows(table, torch.tensor([rows - 1, 53_687]), out)
        words = torch.tensor(key(1, 2, 0, "w"), dtype=torch.int32)
        for row, found in zip((rows - 1, 53_687), out, strict=True):
            index = torch.arange(row * columns, (row + 1) * columns).to(torch.int32)
            assert torch.equal(found / SCALE, codes(index, words, "gaussian").float())

    @pytest.mark.parametrize("row", [-1, 9])
    def test_rows_that_do_not_exist_are_refused(self, row: int) -> None:
        with pytest.raises(IndexError):
            direction().add_to_rows(torch.zeros(9, 3), torch.tensor([row]), torch.empty(1, 3))


class TestAccumulate:
    @given(shape=shapes, decay=st.floats(0, 1, width=32), num_queries=st.integers(1, 3))
    def test_decays_and_adds(self, shape: tuple, decay: float, num_queries: int) -> None:
        total = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        d = direction(num_queries=num_queries)
        expected = torch.tensor(decay) * total + perturbed(d, torch.zeros(shape))
        d.accumulate(total, decay)
        assert torch.equal(total, expected)

    def test_parts_equal_the_whole(self) -> None:
        whole, parts = torch.zeros(11), torch.zeros(11)
        direction().accumulate(whole)
        direction().accumulate(parts[:4])
        direction().accumulate(parts[4:], start=4)
        assert torch.equal(parts, whole)


OTHERS: dict[str, Callable[[Direction], Direction]] = {
    "plain": lambda direction: direction,
    "mask": lambda direction: Masked(direction, RandomMask(torch.tensor([5, 6], dtype=torch.int32), 0.5)),
    "small weights": lambda direction: MagnitudeMasked(direction, 0.7),
    "curvature": lambda direction: ScaledDirection(direction, FullCurvature(torch.linspace(1, 4, 12).double())),
}


class TestOfElements:
    @pytest.mark.parametrize("name", OTHERS)
    def test_they_are_what_is_added_to_a_weight(self, name: str) -> None:
        weight = torch.linspace(-1, 1, 12, dtype=torch.float64)
        direction = OTHERS[name](directions({"w": weight}, 3, 5, {0: 1.0, 2: -0.5}, "gaussian")["w"])
        direction.add_to(weight, moved := torch.empty_like(weight))
        found = direction.of_elements(weight)
        torch.testing.assert_close(found, moved - weight, rtol=0, atol=1e-14)
        assert torch.equal(direction.of_elements(weight[4:8], 4), found[4:8])

    @pytest.mark.parametrize("name", ["mask", "small weights"])
    def test_loops_that_would_overlook_a_mask_are_not_given_one(self, name: str) -> None:
        weight = torch.ones(12)
        with pytest.raises(TypeError, match="Masked cannot be an argument of a loop: "):
            add_direction(weight, {}, OTHERS[name](directions({"w": weight}, 3, 5, {0: 1.0}, "gaussian")["w"]), "exact")

    def test_steps_go_along_the_directions_of_evaluations(self) -> None:
        with pytest.raises(TypeError, match=r"Half overrides `directions`.*override `directions_of`"):
            type("Half", (MeZO,), {"directions": lambda *_: {}})


class TestDirections:
    @given(order=st.permutations(["a", "b", "c", "d"]), count=st.integers(1, 4))
    def test_neither_order_nor_company_matters(self, order: list[str], count: int) -> None:
        tensors = {name: torch.zeros(6) for name in "abcd"}
        everything = directions(tensors, seed=3, step=4, coefficients={0: 0.5, 1: -2.0}, kind="gaussian")
        some = directions({name: tensors[name] for name in order[:count]}, 3, 4, {0: 0.5, 1: -2.0}, "gaussian")
        for name, found in some.items():
            assert torch.equal(perturbed(found, tensors[name]), perturbed(everything[name], tensors[name]))

    def test_it_is_the_weighted_sum_of_its_queries(self) -> None:
        tensors = {"a": torch.zeros(6, dtype=torch.float64)}
        both = directions(tensors, 3, 4, {2: 0.5, 7: -2.0}, "rademacher")["a"]
        expected = 0.5 * standard((6,), key(3, 4, 2, "a"), "rademacher") - 2 * standard(
            (6,), key(3, 4, 7, "a"), "rademacher"
        )
        assert torch.equal(perturbed(both, tensors["a"]), expected.double())

    @pytest.mark.parametrize(
        "other", [{"seed": 4}, {"step": 5}, {"coefficients": {1: 1.0}}, {"parameters": {"b": torch.zeros(64)}}]
    )
    def test_seed_step_query_and_name_each_matter(self, other: dict) -> None:
        arguments = {"parameters": {"a": torch.zeros(64)}, "seed": 3, "step": 4, "coefficients": {0: 1.0}}
        (one,) = directions(**arguments, kind="gaussian").values()
        (another,) = directions(**arguments | other, kind="gaussian").values()
        assert not torch.equal(perturbed(one, torch.zeros(64)), perturbed(another, torch.zeros(64)))

    def test_mixed_dtypes_share_their_noise(self) -> None:
        tensors = {"a": torch.zeros(6), "b": torch.zeros(6, dtype=torch.float64), "c": torch.zeros(6).bfloat16()}
        made = directions(tensors, 3, 4, {0: SCALE}, "rademacher")
        for name, tensor in tensors.items():
            expected = standard((6,), key(3, 4, 0, name), "rademacher") * SCALE
            assert torch.equal(perturbed(made[name], tensor).float(), expected)

    def test_nothing_to_perturb(self) -> None:
        assert directions({}, 3, 4, {0: 1.0}, "gaussian") == {}


@pytest.mark.parametrize("default_dtype", [torch.float32, torch.float16])
def test_standard_is_unit_noise_in_fp32(default_dtype: torch.dtype) -> None:
    torch.set_default_dtype(default_dtype)
    try:
        found = standard((3, 5), key(1, 2, 0, "w"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, all_codes(15).view(3, 5) * 0.5)
