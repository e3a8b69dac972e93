"""Low-rank perturbations: in activation space, in scratch memory and in plain arithmetic they are the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from optimizer_steps import standard
from zolightning.directions.basis import Basis
from zolightning.directions.dense import Direction
from zolightning.directions.low_rank import LowRank, stacked_product
from zolightning.evaluation.perturbed import Perturbed
from zolightning.optim import LOZO, SubspaceMeZO, SubspaceOptimizer, SubZero

KEY, EPS = (5, -7), 2.0**-4
SIDES = ["left", "right", "both"]


def basis(shape: tuple[int, int], sides: str, dtype: torch.dtype = torch.float32) -> Basis:
    draw = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(size, 2, generator=draw)).Q.to(dtype) for size in shape)
    return Basis(None if sides == "right" else left, None if sides == "left" else right)


def direction(eps: float = EPS) -> Direction:
    # The noise of one direction has codes of half units
    return Direction(torch.tensor([KEY], dtype=torch.int32), torch.tensor([eps / 2]), "gaussian")


def low_rank(
    shape: tuple[int, int], sides: str, pending: bool = True, drawn: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[LowRank, Tensor]:
    """A perturbation of an (m, n) matrix, and the matrix that it adds."""
    b = basis(shape, sides, dtype=dtype)
    core_shape = b.core_shape(shape)
    core = torch.randn(core_shape, generator=torch.Generator().manual_seed(2)) if pending else None
    total = torch.zeros(core_shape) if core is None else core
    if drawn:
        total = total + EPS * standard(core_shape, KEY)
    wide = Basis(*(None if factor is None else factor.double() for factor in (b.left, b.right)))
    return LowRank(b, shape, core, direction() if drawn else None), wide.lift(total.double())


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("sides", SIDES)
class TestLowRank:
    @pytest.mark.parametrize(("pending", "drawn"), [(True, True), (True, False), (False, True)])
    def test_what_is_added(self, sides: str, pending: bool, drawn: bool) -> None:
        change, expected = low_rank((6, 5), sides, pending, drawn)
        weight = random(6, 5)
        out = torch.empty_like(weight)
        change.add_to(weight, out)
        torch.testing.assert_close(out, weight + expected.float())
        assert torch.linalg.matrix_rank(expected) <= 2

    def test_tensors_that_are_used_as_a_matrix(self, sides: str) -> None:
        change, expected = low_rank((6, 10), sides)
        weight = random(6, 5, 2)
        out = torch.empty_like(weight)
        change.add_to(weight, out)
        torch.testing.assert_close(out, weight + expected.float().view(6, 5, 2))

    @pytest.mark.parametrize("shape", [(9, 4), (6, 6)])
    def test_rows(self, sides: str, shape: tuple[int, int]) -> None:
        change, expected = low_rank(shape, sides)
        table, rows = random(9, 4), torch.tensor([8, 0, 0, 3])
        out = torch.empty(4, 4)
        change.add_to_rows(table, rows, out)
        torch.testing.assert_close(out, (table + expected.float().view(9, 4))[rows])

    @pytest.mark.parametrize("bias", [None, random(24)])
    @pytest.mark.parametrize("rows", [(3,), (2, 3), ()])
    def test_products(self, sides: str, bias: Tensor | None, rows: tuple[int, ...]) -> None:
        change, expected = low_rank((24, 16), sides)
        weight, inputs = random(24, 16), random(*rows, 16)
        found = change.product(F.linear, inputs, weight, bias)
        torch.testing.assert_close(found, F.linear(inputs, weight + expected.float(), bias), rtol=1e-5, atol=1e-5)

    def test_transposed_products(self, sides: str) -> None:
        change, expected = low_rank((24, 16), sides)
        weight, inputs, bias = random(24, 16), random(3, 24), random(16)
        found = change.product(torch.addmm, inputs, weight, bias)
        torch.testing.assert_close(found, inputs @ (weight + expected.float()) + bias, rtol=1e-5, atol=1e-5)

    def test_no_thin_products_where_they_cost_more(self, sides: str) -> None:
        change, _ = low_rank((24, 16), sides)
        assert change.product(F.linear, random(100, 16), random(24, 16), None) is None
        reshaped, _ = low_rank((16, 24), sides)
        assert reshaped.product(F.linear, random(2, 16), random(24, 16), None) is None

    def test_in_bfloat16(self, sides: str) -> None:
        change, expected = low_rank((64, 48), sides, dtype=torch.bfloat16)
        weight, inputs = random(64, 48).bfloat16(), random(4, 48).bfloat16()
        found = change.product(F.linear, inputs, weight, None)
        exact = inputs.double() @ (weight.double() + expected).T
        assert found.dtype == torch.bfloat16
        assert (found.double() - exact).norm() < 2**-7 * exact.norm()

    def test_under_autocast(self, sides: str) -> None:
        change, expected = low_rank((24, 16), sides)
        weight, inputs = random(24, 16), random(3, 16)
        with torch.autocast("cpu", torch.bfloat16):
            found = change.product(F.linear, inputs, weight, None)
        exact = inputs @ (weight + expected.float()).T
        assert found.dtype == torch.bfloat16
        assert (found.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(("func", "shape"), [(F.linear, (48, 24)), (torch.addmm, (24, 48))])
@pytest.mark.parametrize(("groups", "first"), [(1, 20), (2, 48), (4, 108)])
def test_where_building_costs_less_than_thin_products_off_the_cpu(
    func: Callable[..., Tensor], shape: tuple[int, int], groups: int, first: int
) -> None:
    """24 columns in, 48 out: groups that build move 3 x 24 x 48 numbers each; others 24 x 48, and 120 a row."""
    change = LowRank(Basis(torch.empty(shape[0], 2, device="meta")), shape, None, None)
    for rows in (first - groups, first):
        inputs, weight = torch.empty(rows, 24, device="meta"), torch.empty(shape, device="meta")
        output = stacked_product([change] * groups, func, inputs, weight, [None] * groups)
        assert (output is None) == (rows == first) == (rows * 120 >= (3 * groups - 1) * 24 * 48)


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt"])
def network(
    request: pytest.FixtureRequest, write_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> nn.Module:
    """With tied embeddings (GPT-2, OPT) and without, GPT-2 with transposed layers."""
    folder = write_tiny_model(tmp_path_factory.mktemp(request.param), request.param)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class TestNetworks:
    """The loss in activation space is that of weights that are really changed."""

    @pytest.mark.parametrize("tokens", [2, 40])  # thin products, and built weights
    @pytest.mark.parametrize(
        ("method", "rank"), [(SubspaceMeZO, 3), (LOZO, 2), (SubZero, 4), (SubZero, 300)], ids=lambda v: str(v)
    )
    @torch.no_grad()
    def test_losses(self, network: nn.Module, method: type[SubspaceOptimizer], rank: int, tokens: int) -> None:
        ids = torch.randint(2, 200, (1, tokens), generator=torch.Generator().manual_seed(0))

        def loss() -> Tensor:
            return network(ids, labels=ids).loss

        optimizer = method(network.named_parameters(), lr=1.0, eps=0.02, rank=rank)
        optimizer.fold_every_step = False
        optimizer.estimate(loss)
        optimizer.step()  # so that a core is pending
        plain = loss()
        perturbations = optimizer.perturbations(0, 1)
        with Perturbed(perturbations):
            found = loss()
        before = {parameter: parameter.clone() for parameter in perturbations}
        for parameter, perturbation in perturbations.items():
            out = torch.empty_like(parameter)
            perturbation.add_to(before[parameter], out)
            parameter.copy_(out)
        expected = loss()
        for parameter, value in before.items():
            parameter.copy_(value)
        assert abs(expected - plain) > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)

    @torch.no_grad()
    def test_thin_products_are_used(self, network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        """On few tokens only embeddings and vectors are written; no weight of a layer."""
        built: list[tuple[int, ...]] = []
        add_to = LowRank.add_to

        def spy(self: LowRank, weight: Tensor, out: Tensor) -> None:
            built.append(tuple(weight.shape))
            add_to(self, weight, out)

        monkeypatch.setattr(LowRank, "add_to", spy)
        optimizer = SubspaceMeZO(network.named_parameters(), rank=2)
        with Perturbed(optimizer.perturbations(0, 1)):
            network(torch.tensor([[5, 6]]))
        assert built == []
