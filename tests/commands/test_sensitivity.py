"""The sensitivity scan against autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from zolightning.commands.sensitivity import Sensitivity, scan_sensitivity
from zolightning.layers import find_layers

QUERIES = 128


@pytest.fixture(scope="module")
def expected() -> float:
    return 4 / (2 * QUERIES) ** 0.5  # four standard errors


def scan(network: nn.Module, **kwargs: object) -> Sensitivity:
    return scan_sensitivity(find_layers(network), network, **{"num_queries": QUERIES, "seed": 0} | kwargs)


def test_rms_is_the_norm_of_the_gradient(make_layers: Callable[..., nn.Module], expected: float) -> None:
    network = make_layers()
    found = scan(network)
    loss = network()
    loss.backward()
    assert found.loss == pytest.approx(loss.item())
    assert found.relative_error == pytest.approx(expected / 4)
    norms = [torch.cat([p.grad.flatten() for p in layer.parameters()]).norm().item() for layer in network.layers]
    assert max(norms) / min(norms) > 1.2  # layers that can be told apart
    for layer, norm in zip(found.layers, norms, strict=True):
        assert layer.rms == pytest.approx(norm, rel=expected)
        # A Gaussian's mean absolute value is sqrt(2 / pi) times its deviation; curvature adds little at this eps.
        assert layer.mean_change == pytest.approx(norm * found.eps * (2 / torch.pi) ** 0.5, rel=expected)


def test_change_is_that_of_one_sided_perturbations(make_layers: Callable[..., nn.Module]) -> None:
    """Where the gradient is zero, what remains is curvature: ``eps^2 / 2 * trace(H)`` for a quadratic."""

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(10, 10, bias=False).double() for _ in range(2))
            for factor, layer in enumerate(self.layers, start=1):
                nn.init.zeros_(layer.weight)
                layer.factor = factor

        def forward(self) -> torch.Tensor:
            return sum(layer.factor * layer.weight.square().sum() / 2 for layer in self.layers)

    found = scan(Quadratic(), eps=0.1)
    for factor, layer in enumerate(found.layers, start=1):
        assert layer.rms == pytest.approx(0, abs=1e-9)
        assert layer.mean_change == pytest.approx(factor * 0.1**2 / 2 * 100, rel=0.1)


def test_scan_leaves_no_trace(make_layers: Callable[..., nn.Module]) -> None:
    network = make_layers()
    network.head.weight.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in network.named_parameters()}
    state = torch.get_rng_state()
    first, second = scan(network, num_queries=2), scan(network, num_queries=2)
    assert first == second  # seeded
    assert scan(network, num_queries=2, seed=1) != first
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1], name


def test_number_of_forwards(make_layers: Callable[..., nn.Module]) -> None:
    network, calls = make_layers(count=4), []
    scan_sensitivity(find_layers(network), lambda: calls.append(0) or network(), num_queries=3)
    assert len(calls) == 1 + (3 + 2 * 3) * 4  # three of a layer show where it is read


def test_frozen_layers_are_scanned_too(make_layers: Callable[..., nn.Module]) -> None:
    network = make_layers()
    whole = scan(network, num_queries=2)
    assert scan(network.requires_grad_(False), num_queries=2) == whole
    assert not any(parameter.requires_grad for parameter in network.parameters())
