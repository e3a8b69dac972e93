"""The audit finds the parameters that are read where Perturbed does not see it, and leaves the weights as they are."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from live_bytes import LiveBytes
from networks import (
    IDS,
    applied,
    assert_unchanged,
    channels_last_net,
    mlp,
    perturbations,
    snapshot,
    values,
    written_to_the_weights,
)
from zolightning.directions.trials import FlippedBit
from zolightning.evaluation import scratch, torch_functions
from zolightning.evaluation.find_reads import find_readers, find_unseen
from zolightning.evaluation.perturbed import Perturbed

pytestmark = pytest.mark.usefixtures("no_grad")


def mlp_without_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


class TestAudit:
    @pytest.mark.parametrize(
        "compiler", [torch.jit.script, partial(torch.jit.trace, example_inputs=values(3, 5)), lambda net: net]
    )
    def test_torch_script_is_found_and_perturbed_in_place(self, compiler: Callable[[nn.Module], nn.Module]) -> None:
        net = nn.Sequential(nn.Linear(4, 5), compiler(mlp_without_norm()), nn.Linear(3, 2))
        loss, before = applied(values(3, 4)), snapshot(net)
        found = find_unseen(net.parameters(), lambda: loss(net))
        assert found == (set(net[1].parameters()) if isinstance(net[1], torch.jit.ScriptModule) else set())
        assert_unchanged(net, before)
        with Perturbed(perturbations(net), in_place=found):
            mixed = loss(net)
        assert_unchanged(net, before)
        with written_to_the_weights(net):
            assert torch.equal(loss(net), mixed)

    def test_parameters_that_are_read_both_ways_put_all_in_place(self) -> None:
        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.scripted = nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4))

            def forward(self, x: Tensor) -> Tensor:
                return self.scripted(self.first(x)) + F.linear(x, self.scripted.weight, self.scripted.bias)

        net = Both()
        assert find_unseen(net.parameters(), lambda: applied(values(3, 4))(net)) == set(net.parameters())

    def test_unused_parameters_are_perturbed_in_place(self) -> None:
        net = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
        assert find_unseen(net.parameters(), lambda: net["used"](values(3, 4)).sum()) == set(net["unused"].parameters())

    @pytest.mark.parametrize("whole", [True, pytest.param(False, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("warm", [pytest.param(False, marks=pytest.mark.slow), True])
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_compiled_networks(self, whole: bool, warm: bool) -> None:
        """Right through the audit: a compiled graph does not see the exchange, and reads the weights it is given."""
        torch._dynamo.reset()
        net = nn.Sequential(nn.Linear(4, 5), mlp_without_norm())
        loss, before = applied(values(3, 4)), snapshot(net)
        (net if whole else net[1]).compile()
        if warm:
            loss(net)
        found = find_unseen(net.parameters(), lambda: loss(net))
        assert_unchanged(net, before)
        for eps in (0.05, -0.05, 0.2):  # a graph that had kept the noise of one would miss the next
            with Perturbed(perturbations(net, eps), in_place=found):
                compiled = loss(net)
            with Perturbed(perturbations(net, eps), in_place=net.parameters()):
                expected = loss(net)
            torch.testing.assert_close(compiled, expected, rtol=1e-6, atol=0)
        assert_unchanged(net, before)

    def test_a_forward_pass_that_changes_its_weights_is_refused(self) -> None:
        net = nn.Embedding(11, 5, max_norm=1.0)
        loss = applied(IDS)
        loss(net)  # from here on the norms are what they should be
        before = snapshot(net)
        with pytest.raises(
            ValueError, match=r"A parameter of shape \(11, 5\) is changed by the evaluation of the loss itself"
        ):
            find_unseen(net.parameters(), lambda: loss(net))
        assert_unchanged(net, before)

    def test_a_loss_that_writes_through_data_is_refused(self) -> None:
        net, loss = mlp(), applied(values(3, 4))

        def clamping() -> Tensor:
            next(net.parameters()).data.clamp_(-0.1, 0.1)  # which torch does not count as a change
            return loss(net)

        with pytest.raises(ValueError, match="is changed by the evaluation of the loss itself"):
            find_unseen(net.parameters(), clamping)

    def test_a_loss_that_differs_at_equal_weights_is_said(self) -> None:
        """As with a simulator that goes on from where an evaluation has left it."""
        net, loss, calls = nn.ModuleDict({"used": mlp(), "unused": nn.Linear(4, 4)}), applied(values(3, 4)), []

        def simulated() -> Tensor:
            calls.append(1)
            return loss(net["used"]) + len(calls) ** 2

        with pytest.warns(UserWarning, match=r"evaluated again at the same weights .*: such differences are noise"):
            found = find_unseen(net.parameters(), simulated)
        assert found == set(net["unused"].parameters())

    def test_a_loss_that_is_not_finite_gives_no_verdict(self) -> None:
        net = mlp()
        assert find_unseen(net.parameters(), lambda: net(values(3, 4)).sum() * float("nan")) is None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_an_error_in_the_loss_leaves_the_weights_alone(self, dtype: torch.dtype) -> None:
        net, calls = channels_last_net().to(dtype), []

        def fails_at(call: int) -> Tensor:
            calls.append(call)
            if len(calls) == call:
                raise KeyboardInterrupt
            return net(values(2, 3, 7, 7).to(dtype)).double().sum()

        before = snapshot(net)
        for call in (1, 2, 3):
            calls.clear()
            with pytest.raises(KeyboardInterrupt):
                find_unseen(net.parameters(), partial(fails_at, call))
            assert_unchanged(net, before)

    def test_products_in_pieces_may_round_otherwise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As kernels for fewer columns do in half precision, by more than flipped bits change the loss."""
        own = torch_functions.linear_in_pieces
        monkeypatch.setattr("zolightning.evaluation.perturbed.is_cut", lambda weight: weight.ndim == 2)
        monkeypatch.setattr("zolightning.evaluation.perturbed.linear_in_pieces", lambda *args: own(*args) * 1.5)
        net = mlp()
        assert find_unseen(net.parameters(), lambda: applied(values(3, 4))(net)) == set()

    def test_no_more_than_a_piece_is_in_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (torch_functions, scratch):
            monkeypatch.setattr(module, "PIECE_BYTES", 2**16)
        net, inputs = nn.Sequential(nn.Linear(64, 2048), nn.Linear(2048, 64)), values(3, 64)
        peaks = []
        for run in (
            lambda: applied(inputs)(net),
            lambda: find_unseen(net.parameters(), lambda: applied(inputs)(net)),
            lambda: find_readers(net, set(net.parameters()), lambda: applied(inputs)(net)),
        ):
            with LiveBytes() as live:
                assert run() is not None
            peaks.append(live.peak)
        assert max(peaks[1:]) - peaks[0] < 1.5 * 2**16

    def test_order_of_sums_may_vary_a_little(self) -> None:
        net, calls = mlp(), []

        def jittering() -> Tensor:
            calls.append(1)
            return net(values(3, 4)).double().square().mean() * (1 + 1e-6 * (-1) ** len(calls))

        assert find_unseen(net.parameters(), jittering) == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
class TestFlippedBit:
    def test_flipping_twice_restores_every_bit(self, dtype: torch.dtype) -> None:
        weight = values(64, 3).to(dtype).t()  # not contiguous
        flipped = weight.clone()
        FlippedBit().flip_(flipped)
        # One bit, four below the top of the mantissa: between 1/64 and 1/32 of the number
        change = ((flipped - weight).abs() / weight.abs()).double()
        assert (change > 1 / 65).all() and (change < 1 / 31).all()
        FlippedBit().flip_(flipped)
        assert torch.equal(flipped, weight)

    def test_rows(self, dtype: torch.dtype) -> None:
        table, whole = values(6, 3).to(dtype), torch.empty(6, 3, dtype=dtype)
        rows, out = torch.tensor([5, 0, 5]), torch.empty(3, 3, dtype=dtype)
        FlippedBit().add_to(table, whole)
        FlippedBit().add_to_rows(table, rows, out)
        assert torch.equal(out, whole[rows])
