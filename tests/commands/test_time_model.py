"""The cost model of a step: its fit to planted times, and what is measured."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from zolightning.commands.time_model import StepTimeModel, growing_parts, measure_step_times
from zolightning.layers import find_layers


def test_fit_recovers_planted_times() -> None:
    forward, per_parameter = 0.25, 3e-9
    sizes = [0, 10**6, 10**7, 10**9]
    seconds = [2 * forward + per_parameter * size for size in sizes]
    model = StepTimeModel.fit(sizes, seconds)
    assert model.forward == pytest.approx(forward)
    assert model.per_parameter == pytest.approx(per_parameter)
    assert model.r_squared == pytest.approx(1)
    assert [model.seconds(size) for size in sizes] == pytest.approx(seconds)


def test_r_squared_is_the_share_of_variance_explained() -> None:
    sizes, seconds = [0, 1, 2, 3], [1.0, 2.0, 1.0, 3.0]
    model = StepTimeModel.fit(sizes, seconds)
    mean = sum(seconds) / 4
    left = sum((s - model.seconds(size)) ** 2 for size, s in zip(sizes, seconds, strict=True))
    assert model.r_squared == pytest.approx(1 - left / sum((s - mean) ** 2 for s in seconds))
    assert 0.3 < model.r_squared < 0.9


def test_one_size_is_no_line() -> None:
    with pytest.raises(ValueError, match="two different numbers of parameters"):
        StepTimeModel.fit([5, 5], [1.0, 1.0])


@pytest.mark.parametrize(
    ("count", "names"),
    [
        (1, ["MLP of layer 0", "layer 0", "whole model"]),
        (2, ["MLP of layer 0", "layer 0", "all layers", "whole model"]),
        (8, ["MLP of layer 0", "layer 0", "layers 0 to 1", "layers 0 to 3", "all layers", "whole model"]),
    ],
)
def test_scopes_grow(make_layers: Callable[..., nn.Module], count: int, names: list[str]) -> None:
    network = make_layers(count)
    found = growing_parts(network, find_layers(network))
    assert list(found) == names
    sizes = [sum(p.numel() for p in parameters) for parameters in found.values()]
    assert sizes == sorted(sizes)
    one = sum(p.numel() for p in network.layers[0].parameters())
    assert sizes[1] == one and sizes[-1] == sum(p.numel() for p in network.parameters())
    assert count == 1 or sizes[-2] == count * one


def test_layer_without_an_mlp_has_no_row_for_it() -> None:
    network = nn.Module()
    network.layers = nn.ModuleList(nn.Bilinear(2, 2, 2) for _ in range(2))
    assert list(growing_parts(network, find_layers(network))) == ["layer 0", "all layers", "whole model"]


def test_measured_steps_are_whole_and_move_nothing(make_layers: Callable[..., nn.Module]) -> None:
    network = make_layers().float()
    network.inputs, network.targets = network.inputs.float(), network.targets.float()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    forwards: list[bool] = []

    def evaluate() -> Tensor:
        forwards.append(torch.is_grad_enabled())
        time.sleep(0.002)
        return network()

    chosen = growing_parts(network, find_layers(network))
    times = measure_step_times(network, chosen, evaluate, repeats=2)

    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    assert all(p.requires_grad for p in network.parameters())
    assert not any(forwards)
    assert len(forwards) >= 3 * (1 + 2 * len(chosen))
    assert [step.scope for step in times.steps] == list(chosen)
    assert times.forward >= 0.002
    assert all(step.seconds >= 0.004 for step in times.steps)
    assert times.model == StepTimeModel.fit([s.parameters for s in times.steps], [s.seconds for s in times.steps])
