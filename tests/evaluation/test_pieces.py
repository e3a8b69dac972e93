"""Products with a matrix that is perturbed in pieces are those with the perturbed matrix, in the memory of a piece."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from networks import TiedHead, applied, perturbations, values, written_to_the_weights
from zolightning.directions.basis import Basis
from zolightning.directions.dense import Direction, directions
from zolightning.directions.low_rank import LowRank
from zolightning.directions.trials import FlippedBit
from zolightning.evaluation import row_groups as row_groups_file
from zolightning.evaluation import scratch as scratch_file
from zolightning.evaluation import torch_functions
from zolightning.evaluation.perturbed import Perturbed
from zolightning.evaluation.row_groups import RowGroups
from zolightning.evaluation.scratch import Scratch, pieces, scratch_bytes

pytestmark = pytest.mark.usefixtures("no_grad")
ROW = 7 * 4  # bytes of a row of 7 float32


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight rows, at most."""
    for file in (torch_functions, row_groups_file, scratch_file):
        monkeypatch.setattr(file, "PIECE_BYTES", 8 * ROW + 3)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """First element and elements of everything that is perturbed."""
    found: list[tuple[int, int]] = []
    own = Direction.add_to

    def spy(self: Direction, weight: Tensor, out: Tensor, start: int = 0) -> None:
        found.append((start, weight.numel()))
        own(self, weight, out, start)

    monkeypatch.setattr(Direction, "add_to", spy)
    yield found


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 15, 16, 17, 100])
def test_all_rows_once_in_even_pieces_of_one_size(rows: int) -> None:
    parts = list(pieces(torch.empty(rows, 7), 8 * ROW + 3))
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
    assert all(part.start % 2 == 0 and part.stop - part.start <= 8 for part in parts)
    assert len(parts) == -(-rows // 8) and len({part.stop - part.start for part in parts[:-1]}) <= 1


def test_a_row_that_is_larger_than_a_piece() -> None:
    assert list(pieces(torch.empty(5, 1000), 100)) == [slice(0, 2), slice(2, 4), slice(4, 5)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("host", ["cpu", "another"])  # as on a GPU, where products write to columns of the output
def test_the_output_is_that_of_the_perturbed_matrix(
    dtype: torch.dtype,
    bias: bool,
    autocast: bool,
    host: str,
    starts: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_functions, "HOST", host)
    layer, inputs = nn.Linear(7, 21, bias).to(dtype), values(2, 3, 7).to(dtype)
    with Perturbed(perturbations(layer)):
        assert layer(inputs[:0]).shape == (0, 3, 21)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with written_to_the_weights(layer):
            expected = layer(inputs)
        starts.clear()
        with Perturbed(perturbations(layer)):
            found = layer(inputs)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)
    size = {torch.float64: 4, torch.bfloat16: 12}[dtype]  # rows of a piece
    assert starts[bias:] == [(7 * row, 7 * min(size, 21 - row)) for row in range(0, 21, size)]


def test_a_tied_table_takes_the_memory_of_a_piece() -> None:
    net, scratch = TiedHead().double(), Scratch()
    loss = applied(torch.tensor([[1, 5], [0, 3]]))
    with written_to_the_weights(net):
        expected = loss(net)
    with Perturbed(perturbations(net), scratch=scratch):
        torch.testing.assert_close(loss(net), expected)
    (free,) = scratch._free.values()
    assert max(len(buffer._bytes) for buffer in free) <= scratch_bytes(net.parameters()) < net.head.weight.nbytes


class TestOtherChanges:
    """Than dense directions: what finds out where weights are read, and what low-rank methods add."""

    @pytest.fixture(params=["flipped bit", "left", "right", "both", "pending alone"])
    def change(self, request: pytest.FixtureRequest) -> FlippedBit | LowRank:
        if request.param == "flipped bit":
            return FlippedBit()
        left, right = values(21, 2).double() if request.param != "right" else None, values(7, 3).double()
        basis = Basis(left, None if request.param == "left" else right)
        core = torch.randn(basis.core_shape((21, 7)), dtype=torch.float64)
        direction = directions({"w": core}, 0, 0, {0: 0.1}, "gaussian")["w"]
        return LowRank(basis, (21, 7), core, None if request.param == "pending alone" else direction)

    @pytest.mark.parametrize("rows", [3, 24])  # of input: of many a low-rank product is that with a weight built
    @pytest.mark.parametrize("groups", [1, 2])
    def test_no_more_than_a_piece_is_in_memory(self, change: FlippedBit | LowRank, rows: int, groups: int) -> None:
        layer, inputs, scratch = nn.Linear(7, 21).double(), values(groups * rows, 7).double(), Scratch()
        change.add_to(layer.weight.detach(), whole := torch.empty(21, 7, dtype=torch.float64))
        expected = nn.functional.linear(inputs, whole, layer.bias)
        each = [Perturbed({layer.weight: change}, scratch=scratch) for _ in range(groups)]
        with each[0] if groups == 1 else RowGroups(each, groups * rows, {}):
            torch.testing.assert_close(layer(inputs), expected)
        buffers = [buffer for free in scratch._free.values() for buffer in free]
        assert sum(len(buffer._bytes) for buffer in buffers) <= scratch_bytes(layer.parameters()) < whole.nbytes


def test_autograd_has_the_whole_matrix() -> None:
    layer, inputs = nn.Linear(7, 21), values(3, 7).requires_grad_()
    with torch.enable_grad(), Perturbed(perturbations(layer)):
        (grad,) = torch.autograd.grad(layer(inputs).sum(), inputs)
    with written_to_the_weights(layer):
        torch.testing.assert_close(grad, layer.weight.sum(0).expand(3, 7))


def test_bytes_of_scratch() -> None:
    assert scratch_bytes([]) == 0
    assert scratch_bytes([torch.empty(2, 7), torch.empty(3)]) == 2 * ROW
    assert scratch_bytes([torch.empty(100, 7), torch.empty(9)]) == 8 * ROW + 3
    assert scratch_bytes([torch.empty(100, 7), torch.empty(50, 7, 2)]) == 100 * ROW  # a convolution is not cut
