"""Perturbations of the other sign, made of those of one: the bits of those that a method makes itself."""

from typing import Any

import pytest
import torch
from torch import nn

from optimizer_steps import MakeProblem, Method, attached, bits
from zolightning.directions.dense import Direction
from zolightning.directions.opposite import Opposite, have_opposites
from zolightning.directions.signed import Signed
from zolightning.directions.slices import Slice
from zolightning.evaluation.graph_inputs import Parts
from zolightning.optim import MeZO, SubspaceOptimizer, ZerothOrderOptimizer
from zolightning.optim.estimators import Probe
from zolightning.optim.probing import perturbations_at

CPU = torch.device("cpu")


def written(parameter: nn.Parameter, change: Any) -> torch.Tensor:
    stored = parameter.detach().contiguous()
    out = torch.empty_like(stored)
    change.add_to(stored, out)
    return bits(out)


def assert_opposite(plus: Any, minus: Any) -> None:
    opposite = Opposite(plus)
    assert have_opposites(plus) and opposite.keys() == minus.keys()
    for parameter, change in minus.items():
        assert torch.equal(written(parameter, opposite[parameter]), written(parameter, change))


@pytest.mark.filterwarnings("ignore:`update_precision` is 'native'")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opposites_have_the_bits_of_the_other_sign(
    method: Method, dtype: torch.dtype, make_problem: MakeProblem
) -> None:
    problem = make_problem(dtype)
    optimizer = attached(method, problem, seed=0)
    if isinstance(optimizer, SubspaceOptimizer):
        optimizer.fold_every_step = False  # so that some updates are pending
    for _ in range(2):
        with torch.no_grad():
            assert_opposite(optimizer.perturbations(0, 1), optimizer.perturbations(0, -1))
        optimizer.estimate(problem)
        optimizer.step()


def test_opposites_of_slices_leave_the_rest_as_it_is() -> None:
    net = nn.Linear(4, 3)
    optimizer = MeZO(net.named_parameters(), seed=0)
    optimizer.attach(net)
    optimizer.restrict({net.weight: Slice(0, torch.tensor([0, 2]))})
    with torch.no_grad():
        assert_opposite(*(perturbations_at(optimizer, [[Probe(0, sign)]])[0] for sign in (1, -1)))


@pytest.mark.filterwarnings("ignore:`update_precision` is 'native'")
def test_both_signs_are_one_graph_where_they_differ_in_coefficients_alone(
    method: Method, make_problem: MakeProblem
) -> None:
    optimizer = attached(method, make_problem(torch.float32), seed=0)
    plus, minus = perturbations_at(optimizer, [[Probe(0, 1)], [Probe(0, -1)]])
    known: dict[int, Parts] = {}
    one, other = (Parts.of([changes], CPU, known) for changes in (plus, minus))
    expected = Parts([optimizer.perturbations(0, -1)], CPU)
    assert isinstance(minus, Opposite) and other.key == expected.key
    assert (one.key == other.key) is not any(isinstance(change, Signed) for change in plus.values())
    assert all(map(torch.equal, other.tables, expected.tables))


def test_a_perturbation_without_an_opposite_is_asked_for_with_either_sign(make_problem: MakeProblem) -> None:
    class Bare:
        def __init__(self, direction: Direction) -> None:
            self.add_to, self.add_to_rows = direction.add_to, direction.add_to_rows

    class Own(MeZO):
        def perturbations(self, query: int, sign: int) -> Any:
            return {p: Bare(change) for p, change in super().perturbations(query, sign).items()}

    records = []
    for kind in (MeZO, Own):
        problem = make_problem(torch.float32)
        optimizer: ZerothOrderOptimizer = attached(kind, problem, seed=0)
        records.append(optimizer.estimate(problem))
    assert vars(records[0]) == vars(records[1]) and records[0].projected_grads[0]
