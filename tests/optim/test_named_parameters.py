"""What moves is looked up once, and anew whenever it is something else."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from graph_runs import CPUCapture, equal, inputs, mlp, seeded
from zolightning.directions.basis import Basis
from zolightning.directions.slices import Slice
from zolightning.evaluation.graphs import GraphedNetwork
from zolightning.optim import LOZO, MeZO, StepRecord, SubspaceMeZO


def test_names_follow_what_moves() -> None:
    net = nn.ModuleDict({"one": nn.Linear(3, 2), "two": nn.Linear(2, 2), "three": nn.Linear(2, 1)})
    one, two, three = net["one"], net["two"], net["three"]
    optimizer = MeZO([*one.parameters(), *two.parameters()])

    def named() -> dict[str, nn.Parameter]:
        found = optimizer.named(optimizer.param_groups[0])
        assert found is optimizer.named(optimizer.param_groups[0])
        return {name: parameter for parameter, name in found.items()}

    assert [*named()] == ["0.0", "0.1", "0.2", "0.3"]
    optimizer.attach(net)
    assert [*named()] == ["one.weight", "one.bias", "two.weight", "two.bias"]
    one.bias.requires_grad_(False)
    assert [*named()] == ["one.weight", "two.weight", "two.bias"]
    assert len(optimizer.named(optimizer.param_groups[0], frozen=True)) == 4
    one.bias.requires_grad_(True)
    optimizer.set_blocks([[one.weight, one.bias], [two.weight]])
    optimizer.activate([0])
    assert [*named()] == ["one.weight", "one.bias", "two.bias"]
    optimizer.activate([1])
    assert [*named()] == ["two.weight", "two.bias"]
    optimizer.activate([])
    optimizer.add_param_group({"params": list(three.parameters())})
    assert [name for _, name, _ in optimizer.trainable()] == [name for name, _ in net.named_parameters()]
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["params"][0] = replaced = nn.Parameter(torch.zeros(2, 3))
    optimizer.set_names({replaced: "replaced"})
    assert named()["replaced"] is replaced and "one.weight" not in named()


@pytest.mark.parametrize("method", [partial(MeZO, eps=0.5), partial(SubspaceMeZO, eps=0.5, rank=2)])
def test_a_group_that_is_added_between_steps_moves_along_what_was_evaluated(method: Any) -> None:
    """At a linear loss, whose two evaluations see ``eps z`` and ``-eps z``."""
    net = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("one", "two")})
    seen = []

    def loss() -> torch.Tensor:
        weight = net["two"].weight + 0.0
        seen.append(weight.detach().clone())
        return net["one"].weight.sum() + weight.sum()

    optimizer = method(net["one"].parameters(), lr=0.25)
    optimizer.attach(net)
    for _ in range(3):
        optimizer.estimate(loss)
        optimizer.step()
    before = net["two"].weight.detach().clone()
    optimizer.add_param_group({"params": list(net["two"].parameters())})
    seen.clear()
    (g,) = optimizer.estimate(loss).projected_grads
    optimizer.step()
    optimizer.fold()
    direction = (seen[-2] - seen[-1]) / 2 / 0.5
    torch.testing.assert_close(net["two"].weight.detach() - before, -0.25 * g * direction)
    assert direction.abs().sum() > 1


def test_a_group_that_is_added_has_the_scale_of_the_learning_rate() -> None:
    """That of LearningRateProbe and LearningRateControl, which they keep with the groups that there are."""
    one, two = nn.Linear(2, 3), nn.Linear(3, 2)
    optimizer = MeZO(one.parameters(), lr=0.5)
    optimizer.lr_scale = 0.25
    optimizer.add_param_group({"params": list(two.parameters()), "lr": 2.0})
    net = nn.Sequential(one, two)
    optimizer.attach(net)
    assert optimizer.estimate(lambda: net(torch.ones(2)).sum()).lr == (0.125, 0.5)


def test_matrices_follow_ranks_and_slices() -> None:
    net = nn.Linear(6, 4)
    optimizer = SubspaceMeZO(net.named_parameters(), rank=2)
    group = optimizer.param_groups[0]

    def matrix() -> tuple[int, ...]:
        assert optimizer.split(group) is optimizer.split(group)
        return tuple(optimizer.split(group)[0]["weight"][1])

    assert matrix() == (4, 6, 2)
    group["rank"] = 3
    assert matrix() == (4, 6, 3)
    optimizer.restrict({net.weight: Slice(1, torch.tensor([1, 4]))})
    assert matrix() == (4, 2, 3)
    net.weight.requires_grad_(False)
    assert not optimizer.split(group)[0] and optimizer.split(group, frozen=True)[0]


def test_given_bases_are_the_methods_own() -> None:
    weight, factor = nn.Parameter(torch.zeros(6, 4)), torch.eye(4)[:, :2]
    optimizer = LOZO([("weight", weight)], rank=2)
    optimizer.resample({weight: Basis(right=factor)})
    factor.zero_()
    assert torch.equal(optimizer.basis(weight).right, torch.eye(4)[:, :2])


@pytest.mark.parametrize("method", [MeZO, partial(LOZO, rank=2), partial(SubspaceMeZO, rank=2, betas=(0.9, 0.99))])
def test_graphs_follow_what_changes_between_steps(method: Callable[..., Any]) -> None:
    """Each run begins anew after each change, without what the run beside it knows from earlier steps."""

    def changed(net: Any, optimizer: Any, step: int) -> None:
        if step == 1:
            net[0].weight.requires_grad_(False)
        if step == 3:
            net[0].weight.requires_grad_(True)
        if step == 6 and hasattr(optimizer, "resample"):
            optimizer.resample()
        if step == 8:
            net[3].weight.data = net[3].weight.data.clone() + 1
        if step == 10:
            net[2] = nn.Identity()
        if step == 12:
            net[2] = net[0]  # which then reads its parameters twice

    def square() -> nn.Module:
        net = mlp()
        net[0] = nn.Linear(8, 8)
        return net

    def run(begins_anew: bool, capture: CPUCapture | None) -> tuple[list[StepRecord], list[torch.Tensor]]:
        module, state, records = seeded(square), None, []
        net = module.net
        for step in range(15):
            if is_new := state is None or (begins_anew and step % 2 == 0 and net[0].weight.requires_grad):
                optimizer = method(net.named_parameters(), lr=1e-2, seed=5)
                optimizer.fold_every_step = False
                if state is not None:
                    optimizer.load_state_dict(state)
                optimizer.attach(module)
            if is_new and capture is not None:
                optimizer.evaluator.graphs = GraphedNetwork(net, capture)
            changed(net, optimizer, step)
            records.append(optimizer.estimate(partial(module.loss, inputs(2, 8, seed=step))))
            optimizer.step()
            state = optimizer.state_dict()
        optimizer.detach()
        return records, [parameter.detach() for parameter in module.parameters()]

    expected, weights = run(True, None)
    capture = CPUCapture()
    for graphs in (None, capture):
        records, found = run(False, graphs)
        assert equal(expected, records) and all(map(torch.equal, weights, found))
    assert capture.recorded > 4
