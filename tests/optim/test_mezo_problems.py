"""MeZO on small problems, with weights that are read where nobody sees it, and under autocast."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimizer_steps import run
from zolightning.optim import MeZO


def test_logistic_regression() -> None:
    """The toy problem of MeZO's reimplementations, whose loss is 0.175 to 0.180 in the end. Half the rate: 0.28."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1000, 50, generator=generator)
    labels = (inputs @ torch.randn(50, generator=generator) > 0).float()
    inputs *= 2 * labels[:, None] - 1  # so that the loss is softplus(-margin)
    weight = nn.Parameter(torch.zeros(50))
    optimizer = MeZO([weight], lr=2e-2, eps=1e-3)
    for _ in range(1000):
        batch = inputs[torch.randint(1000, (64,), generator=generator)]
        optimizer.estimate(lambda batch=batch: F.softplus(-batch @ weight).mean())
        optimizer.step()
    assert F.softplus(-inputs @ weight).mean() < 0.25


def test_an_objective_without_derivatives() -> None:
    """Accuracy itself, which backpropagation cannot follow."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 10, generator=generator)
    labels = inputs @ torch.randn(10, generator=generator) > 0
    weight = nn.Parameter(torch.randn(10, generator=generator))

    def error() -> Tensor:
        return ((inputs @ weight > 0) != labels).float().mean()

    before = error().item()
    optimizer = MeZO([weight], lr=1.0, eps=0.3, num_queries=4)
    for _ in range(200):
        optimizer.estimate(error)
        optimizer.step()
    assert before > 0.3 and error() < 0.1


class TestWeightsThatAreReadUnseen:
    class Net(nn.Module):
        def __init__(self, script: bool = False) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
            self.unused = nn.Parameter(torch.ones(2))
            if script:
                self.second = torch.jit.script(self.second)

        def forward(self) -> Tensor:
            return self.second(torch.tanh(self.first(torch.ones(2, 3)))).square().sum()

    def test_are_perturbed_in_place_and_named(self) -> None:
        plain, scripted, records, bits = self.Net(), self.Net(script=True), [], []
        for net, names in ((plain, "1 parameter .*: unused"), (scripted, "3 parameters .*: unused, second.weight, ")):
            optimizer = MeZO(net.named_parameters(), lr=1e-2)
            with pytest.warns(UserWarning, match=names):
                records.append(run(net, optimizer, steps=1))
            records[-1] += run(net, optimizer, steps=3)  # a second warning would be an error
            bits.append([parameter.detach().clone() for parameter in net.parameters()])
        assert records[0] == records[1]
        assert all(map(torch.equal, *bits))

    @pytest.mark.filterwarnings("ignore:.*perturbed in place", "ignore:.*such parameters cannot be stacked")
    @pytest.mark.parametrize("size", [1, 2])
    def test_a_list_of_scripted_layers(self, size: int) -> None:
        """They take no hooks, by which it is found out which layers evaluations have in common."""

        class Layers(nn.Module):
            def __init__(self, script: bool) -> None:
                super().__init__()
                layer = TestWeightsThatAreReadUnseen.Net(script).second
                self.layers = nn.ModuleList([layer])

            def forward(self, x: Tensor) -> Tensor:
                return self.layers[0](x)

        records = []
        for script in (False, True):
            net = Layers(script)
            optimizer = MeZO(net.named_parameters(), lr=1e-2, seed=0)
            optimizer.attach(net, size)
            records.append(optimizer.estimate(lambda net=net: net(torch.ones(2, 4)).square().mean()))
        assert records[1].losses == pytest.approx(records[0].losses, rel=1e-6)

    def test_until_a_loss_is_finite_all_are_perturbed_in_place(self) -> None:
        net, broken = self.Net(script=True), True
        del net.unused
        optimizer = MeZO(net.named_parameters(), lr=1e-2)

        def loss() -> Tensor:
            return net() * (float("nan") if broken else 1)

        optimizer.estimate(loss, skip_nonfinite=True)
        optimizer.step()
        broken = False
        with pytest.warns(UserWarning, match="2 parameters are unused or read where .* Freeze those that are unused"):
            optimizer.estimate(loss)


def test_an_update_leaves_no_stale_casts_of_autocast() -> None:
    net, x = nn.Linear(8, 8), torch.ones(2, 8)
    optimizer = MeZO(net.named_parameters(), lr=1e-3)

    def loss() -> Tensor:
        return net(x).float().square().sum()

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for _ in range(3):
            before = loss()  # makes casts
            optimizer.estimate(loss)
            optimizer.step()
            after = loss()
            torch.clear_autocast_cache()
            assert after == loss() and after != before
