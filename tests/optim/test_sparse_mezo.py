"""Sparse-MeZO: which weights move. What all methods share is in test_all_methods*.py."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizer_steps import assert_same, attached, bits, run, weights
from zolightning.directions.dense import Direction
from zolightning.directions.masked import MagnitudeMasked, Masked, PackedMask, RandomMask, packed
from zolightning.directions.slices import Slice
from zolightning.kernels.noise import coefficient, key
from zolightning.optim import SparseMeZO
from zolightning.optim.sparse_mezo import kth_smallest_magnitude

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Net(nn.Module):
    """A table, a matrix of 400 weights and a bias; all move the loss."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.table = nn.Embedding(10, 20)
            self.linear = nn.Linear(20, 20)
        self.to(dtype)

    def forward(self) -> Tensor:
        return self.linear(self.table.weight).double().square().mean()


def codes_of(optimizer: SparseMeZO, parameter: nn.Parameter) -> Tensor:
    """Where the unmasked direction of the next step is not 0."""
    (group,) = optimizer.param_groups
    direction = optimizer.directions(group, group["seed"], group["step"], {0: 1.0})[parameter]
    total = torch.zeros(parameter.numel())
    direction.accumulate(total)
    return (total != 0).view(parameter.shape)


class TestMask:
    @pytest.mark.parametrize("mask", ["dynamic", "fixed", "random"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_probes_and_update_of_a_step_share_it_and_all_else_keeps_every_bit(self, mask: Any, dtype: Any) -> None:
        """Over steps long enough to carry weights over the threshold: no step sees another mask than its probes."""
        net = Net(dtype)
        optimizer = attached(SparseMeZO, net, lr=0.3, eps=0.1, mask=mask, sparsity=0.7)
        weight, seen = net.linear.weight, []
        first = bits(weight)
        for _ in range(12):
            stored, not_zero = weight.detach().clone(), codes_of(optimizer, weight)
            perturbed = [torch.empty_like(stored) for _ in range(2)]
            for sign, out in zip((1, -1), perturbed, strict=True):
                optimizer.perturbations(0, sign)[weight].add_to(stored, out)
            plus, minus = (out != stored for out in perturbed)
            if mask == "dynamic" and seen:
                threshold = optimizer.state[weight]["threshold"]
                assert torch.equal(plus, not_zero & (stored.abs() <= threshold))
            before = {name: value.clone() for name, value in extra_bits(optimizer, weight).items()}
            run(net, optimizer, 1)
            moved = weight.detach() != stored
            for name, value in extra_bits(optimizer, weight).items():
                moved |= (value != before.get(name, stored.float().flatten() if name == "master" else 0)).view(
                    weight.shape
                )
            assert torch.equal(plus, minus) and torch.equal(moved, plus)
            seen.append(plus)
        ever = torch.stack(seen).any(0)
        assert torch.equal(bits(weight)[~ever], first[~ever])
        if mask != "dynamic":  # every element of the mask has moved, within 12 steps
            assert ever.double().mean() == pytest.approx(0.3, abs=0.001 if mask == "fixed" else 0.1)

    def test_the_smallest_move(self) -> None:
        net = Net()
        before = net.linear.weight.detach().clone()
        run(net, optimizer := attached(SparseMeZO, net, lr=0.1), 30)
        moved = net.linear.weight.detach() != before
        assert moved.sum() == 100
        assert before[moved].abs().max() < before[~moved].abs().min()
        assert optimizer.state[net.linear.weight] == {"threshold": before[moved].abs().max().item()}
        assert (net.linear.bias != Net().linear.bias).all() and not optimizer.state[net.linear.bias]
        share = optimizer.measurements()["share_moving"]
        assert share == pytest.approx(moving(net, optimizer), abs=1e-12) and 0 < share < 0.25

    def test_embeddings_may_move_as_wholes(self) -> None:
        net = Net()
        run(net, attached(SparseMeZO, net, lr=0.1, sparse_embeddings=False), 20)
        assert (net.table.weight != Net().table.weight).all()
        assert (net.linear.weight == Net().linear.weight).sum() == 300

    def test_a_matrix_of_zeros_moves_as_a_whole(self) -> None:
        net = Net()
        nn.init.zeros_(net.linear.weight[4:])
        run(net, attached(SparseMeZO, net, lr=0.1), 20)
        assert (net.linear.weight[4:] != 0).all()

    def test_the_share_that_moves_is_that_of_a_slice(self) -> None:
        net = Net()
        weight, part = net.linear.weight, Slice(0, torch.arange(4))
        weight.data[4:] *= 100
        optimizer = attached(SparseMeZO, net, [weight], lr=0.01)
        optimizer.restrict({weight: part})
        run(net, optimizer, 3)
        share = (part.take(weight.detach()).abs() <= optimizer.state[weight]["threshold"]).double().mean().item()
        assert optimizer.measurements()["share_moving"] == pytest.approx(share, abs=1e-12) and share > 0.1

    def test_a_block_that_is_left_keeps_its_threshold(self) -> None:
        net = Net(torch.bfloat16)
        optimizer = attached(SparseMeZO, net, lr=0.3, eps=0.1)
        optimizer.set_blocks([net.table.parameters(), net.linear.parameters()])
        thresholds = []
        for block in (0, 1, 0, 1):
            optimizer.activate([block])
            run(net, optimizer, 5)
            weight = (net.table, net.linear)[block].weight
            assert "low_word" in optimizer.state[weight]
            thresholds.append(optimizer.state[weight]["threshold"])
        assert thresholds[:2] == thresholds[2:]


def moving(net: Net, optimizer: SparseMeZO) -> float:
    masked = (net.linear.weight, net.table.weight)
    count = sum(int((weight.abs() <= optimizer.state[weight]["threshold"]).sum()) for weight in masked)
    return count / sum(weight.numel() for weight in masked)


def extra_bits(optimizer: SparseMeZO, weight: nn.Parameter) -> dict[str, Tensor]:
    return {name: value for name, value in optimizer.state[weight].items() if name in ("low_word", "master")}


@pytest.mark.parametrize("kind", ["magnitude", "packed", "random"])
def test_any_part_of_a_masked_direction_is_that_of_the_whole(kind: str) -> None:
    """Pieces of rows, rows of a table, both signs, and zeros of both signs in what stays."""
    table = torch.randn(100, 1002, generator=torch.Generator().manual_seed(0))
    table[::3, ::7], table[1::3, ::7] = -0.0, 0.0
    keys = torch.tensor([key(0, 0, 0, "w")], dtype=torch.int32)
    moves = torch.rand(table.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    random = RandomMask(torch.tensor(key(0, -1, 0, "w"), dtype=torch.int32), 0.3)

    def masked(c: float) -> Direction:
        direction = Direction(keys, torch.tensor([c]), "gaussian", (c,))
        if kind == "magnitude":
            return MagnitudeMasked(direction, 0.7)
        return Masked(direction, random if kind == "random" else PackedMask(packed(moves.view(-1))))

    if kind == "magnitude":
        moves = table.abs() <= 0.7
    if kind == "random":
        moves = random.at(torch.arange(table.numel())).view(table.shape)
        assert moves.double().mean() == pytest.approx(0.3, abs=4 * (0.21 / table.numel()) ** 0.5)
    plus, minus = masked(coefficient(0.1, "gaussian")), masked(coefficient(-0.1, "gaussian"))
    assert plus.is_opposite(minus)
    dense, whole, opposite, one, two = (torch.empty_like(table) for _ in range(5))
    Direction(keys, plus.coefficients, "gaussian").add_to(table, dense)
    plus.add_to(table, whole), minus.add_to(table, opposite)
    assert torch.equal(bits(whole), torch.where(moves, bits(dense), bits(table)))
    plus.add_both(table, one, two)
    assert torch.equal(bits(one), bits(whole)) and torch.equal(bits(two), bits(opposite))
    piece = torch.empty(30, 1002)
    plus.add_to(table[50:80], piece, start=50 * 1002)
    assert torch.equal(piece, whole[50:80])
    index, gathered = torch.tensor([99, 0, 7, 7]), torch.empty(4, 1002)
    plus.add_to_rows(table, index, gathered)
    assert torch.equal(bits(gathered), bits(whole[index]))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_kth_smallest_magnitude(dtype: torch.dtype) -> None:
    """In more than one chunk, with many ties in half precision, zeros, subnormal numbers, infinities and NaNs."""
    values = torch.randn(2**20 + 77, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[::9], values[1::9], values[2::9] = -0.0, torch.finfo(dtype).smallest_normal / 4, float("inf")
    values[3::9] = float("nan")
    expected = values.abs().sort().values
    for k in (1, 2**17, 2**18, 2**19, 2**19 + 1, len(values) // 9 * 7):
        assert kth_smallest_magnitude(values, k) == expected[k - 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({"sparsity": value}, "`sparsity` must lie between 0 and 1, got") for value in (0.0, 1.0, -0.5, 75)),
        ({"mask": "static"}, "`mask` must be one of"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseMeZO([nn.Parameter(torch.zeros(2, 2))], **arguments)


@pytest.mark.parametrize("mask", ["fixed", "random"])
def test_a_run_goes_on_with_its_mask(mask: Any) -> None:
    net, restored = Net(), Net()
    options = {"lr": 0.3, "mask": mask, "seed": 3}
    run(net, optimizer := attached(SparseMeZO, net, **options), 4)
    restored.load_state_dict(net.state_dict())
    other = attached(SparseMeZO, restored, **options | {"seed": 4})
    other.load_state_dict(optimizer.state_dict())
    run(net, optimizer, 3), run(restored, other, 3)
    assert_same(weights(restored), weights(net))
