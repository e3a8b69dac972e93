"""Small perturbed tensors made together, as they are on a GPU: the same bits in a few launches."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks import mlp, perturbations, values
from zolightning import kernels
from zolightning.evaluation import perturbed
from zolightning.evaluation.perturbed import Perturbed
from zolightning.evaluation.scratch import Scratch
from zolightning.optim import GRZO, LOZO, HiZOO, MeZO, StepRecord, ZerothOrderOptimizer
from zolightning.optim.estimators import TwoSided


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Of the loops: those that :func:`kernels.for_each` makes on a CPU do not count."""
    found: Counter[str] = Counter()

    def counted(name: str, own: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        before = found.copy()
        own(*args, **kwargs)
        found.clear()
        found.update(before + Counter([name]))

    own_for_each = kernels.for_each
    names = {}
    for name in ("perturb", "perturb_rows", "add", "add_curved"):
        monkeypatch.setattr(kernels, name, loop := partial(counted, name, getattr(kernels, name)))
        names[loop] = f"{name} for each"

    def for_each(loop: Any, calls: list[Any]) -> None:
        if calls:
            counted(names.get(loop, "other"), own_for_each, loop, calls)

    monkeypatch.setattr(kernels, "for_each", for_each)
    return found


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perturbed, "HOST", "none")


def trained(
    method: Callable[..., ZerothOrderOptimizer], steps: int = 3, rows: int = 3
) -> tuple[list[StepRecord], list[Tensor]]:
    torch.manual_seed(0)
    net, inputs = mlp().bfloat16(), values(rows, 4).bfloat16()
    optimizer = method(net.named_parameters(), lr=1e-2, seed=0)
    optimizer.attach(net)
    records = []
    for _ in range(steps):
        records.append(optimizer.estimate(lambda: net(inputs).float().square().mean()))
        optimizer.step()
    return records, list(net.parameters())


@pytest.mark.parametrize(
    ("method", "launches"),
    [
        # Two evaluations, each of two matrices and four vectors, and an update
        (MeZO, {"perturb for each": 2, "perturb": 4, "add for each": 1}),
        (HiZOO, {"perturb for each": 2, "perturb": 4, "add_curved for each": 1}),
        (partial(HiZOO, curvature="scalar"), {"perturb for each": 2, "perturb": 4, "add for each": 1}),
        # Of matrices the cores, which have two shapes, and are updated by themselves
        (partial(LOZO, rank=2), {"perturb for each": 2, "add for each": 3}),
        # Four evaluations; cores, the signs of each of two queries, and vectors
        (
            partial(GRZO, rank=2, num_queries=2, estimator=TwoSided()),
            {"perturb for each": 4, "add for each": 4},
        ),
        (partial(LOZO, rank=2, momentum=0.9), {"perturb for each": 2, "add for each": 3}),
    ],
)
def test_a_step_has_the_same_bits_in_fewer_launches(
    method: Callable[..., Any], launches: dict[str, int], calls: Counter[str], request: pytest.FixtureRequest
) -> None:
    records, weights = trained(method)
    request.getfixturevalue("as_on_a_gpu")
    same_records, same_weights = trained(method)
    assert [vars(record) for record in same_records] == [vars(record) for record in records]
    assert all(map(torch.equal, same_weights, weights))
    trained(method, 2)
    calls.clear()
    trained(method, 3)
    three = calls.copy()
    calls.clear()
    trained(method, 2)
    del three["other"]
    assert three - calls == Counter(launches)


def test_low_rank_weights_that_are_built_have_the_same_bits(request: pytest.FixtureRequest) -> None:
    records, weights = trained(partial(LOZO, rank=2), rows=100)
    request.getfixturevalue("as_on_a_gpu")
    same_records, same_weights = trained(partial(LOZO, rank=2), rows=100)
    assert [vars(record) for record in same_records] == [vars(record) for record in records]
    assert all(map(torch.equal, same_weights, weights))


class ReturnsItsBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias, self.gain = nn.Parameter(values(5)), nn.Parameter(values(3))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.bias[None], self.gain.exp()


@pytest.mark.usefixtures("as_on_a_gpu", "no_grad")
def test_what_somebody_holds_is_not_overwritten() -> None:
    net, scratch, found = ReturnsItsBias(), Scratch(), []
    for eps in (0.05, -0.05, 0.1):
        with Perturbed(perturbations(net, eps), scratch=scratch):
            found.append(net())
    for eps, (bias, gain) in zip((0.05, -0.05, 0.1), found, strict=True):
        expected = torch.empty(5)
        perturbations(net, eps)[net.bias].add_to(net.bias, expected)
        assert torch.equal(bias[0], expected)
        perturbations(net, eps)[net.gain].add_to(net.gain, expected := torch.empty(3))
        assert torch.equal(gain, expected.exp())


@pytest.mark.usefixtures("as_on_a_gpu", "no_grad")
def test_a_vector_may_get_its_memory_after_others_were_read() -> None:
    """As FSDP's do, whose layers are gathered one after the other."""
    net = ReturnsItsBias()
    added = perturbations(net, 0.05)
    expected = [torch.empty(5), torch.empty(3)]
    for parameter, out in zip(net.parameters(), expected, strict=True):
        added[parameter].add_to(parameter, out)
    memory = net.gain.untyped_storage()
    held = memory.clone()
    memory.resize_(0)
    with Perturbed(added):
        bias = net.bias * 1
        memory.resize_(held.nbytes())
        memory.copy_(held)
        gain = net.gain * 1
    assert torch.equal(bias, expected[0]) and torch.equal(gain, expected[1])


@pytest.mark.usefixtures("as_on_a_gpu")
def test_memory_stays_from_one_evaluation_to_the_next(no_grad: None) -> None:
    net, scratch = mlp(), Scratch()
    places = set()
    for eps in (0.05, -0.05):
        with Perturbed(perturbations(net, eps), scratch=scratch):
            net(values(3, 4))
            places.add(scratch.small_tensors(torch.device("cpu"))._bytes.data_ptr())
    assert len(places) == 1


@pytest.mark.usefixtures("as_on_a_gpu")
def test_what_autograd_keeps_has_memory_of_its_own(calls: Counter[str]) -> None:
    net, inputs = mlp(), values(3, 4)
    outputs = []
    for _ in range(2):
        with Perturbed(perturbations(net, 0.05)):
            outputs.append(net(inputs).sum())
        outputs[-1].backward()
    assert not calls["perturb for each"]
