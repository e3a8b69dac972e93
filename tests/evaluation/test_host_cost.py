"""What a step asks of torch for each weight that is read, and how often it waits for the device."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from networks import mlp, perturbations, values
from optimizer_steps import MakeProblem, Method, attached, estimates
from waits import waiting_is_an_error
from zolightning.directions.slices import Slice
from zolightning.evaluation.perturbed import Perturbed
from zolightning.evaluation.scratch import Scratch
from zolightning.kernels import native
from zolightning.optim import (
    GRZO,
    LOZO,
    HiZOO,
    MeZO,
    MeZOAdam,
    SparseMeZO,
    SubspaceMeZO,
    SubspaceOptimizer,
    ZerothOrderOptimizer,
)
from zolightning.optim.estimators import OneSided, TwoSided

READS = {"item", "tolist", "numpy", "cpu", "equal", "nonzero", "is_nonzero", "allclose", "__contains__"}
READS |= {"__bool__", "__int__", "__float__", "__index__"}


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Functions by which a host asks for what is in a tensor, unless that has been copied to the host before."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.copies: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is Tensor.to and "cpu" in args and "non_blocking" in (kwargs or {}):
            self.copies.append(found)
        elif func.__name__ in READS and not any(args[0] is copy for copy in self.copies):
            self.names.append(func.__name__)
        return found


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("with_readers", [False, True])
def test_a_weight_is_read_without_an_operation_beside_the_noise(with_readers: bool) -> None:
    net, inputs, scratch = mlp(), values(3, 4), Scratch()
    if not native.available(inputs):
        pytest.skip("torch's own loops are operations of torch")
    with Operations() as plain:
        net(inputs)
    readers = [module for module in net if list(module.parameters())] if with_readers else None
    for sign in (1, -1):
        context = Perturbed(perturbations(net, sign * 0.05), scratch=scratch, readers=readers)
        with Operations() as operations, context:
            net(inputs)
        assert len(context.seen) == 6
    assert operations.names == plain.names


def step_of(
    method: Callable[..., ZerothOrderOptimizer], device: str = "cpu", part: Slice | None = None, **settings: Any
) -> Callable[[], ZerothOrderOptimizer]:
    net, inputs = mlp().to(device), values(3, 4).to(device)
    optimizer = method(net.parameters(), seed=0, **settings)
    optimizer.attach(net)
    if part is not None:
        optimizer.restrict({net[0].weight: part})

    def step() -> ZerothOrderOptimizer:
        optimizer.estimate(lambda: net(inputs).square().mean())
        optimizer.step()
        return optimizer

    for _ in range(2):  # which find out where parameters are read
        step()
    return step


@pytest.mark.parametrize("method", [MeZO, LOZO])
@pytest.mark.parametrize("settings", [{}, {"num_queries": 3}, {"num_queries": 2, "estimator": OneSided()}])
def test_a_step_reads_from_the_device_once(method: Callable[..., Any], settings: dict[str, Any]) -> None:
    step = step_of(method, **settings)
    with Operations() as operations, Reads() as reads:
        step()
    assert reads.names == ["tolist"]
    assert not {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"} & set(operations.names)


def bfloat16_step_of(method: Method, device: str, make_problem: MakeProblem) -> Callable[[], ZerothOrderOptimizer]:
    """A step in which cores of subspaces wait, and may have become too large for that."""
    problem = make_problem(torch.bfloat16).to(device)
    optimizer = attached(method, problem, seed=0)
    if isinstance(optimizer, SubspaceOptimizer):
        optimizer.fold_every_step = False

    def step() -> ZerothOrderOptimizer:
        optimizer.estimate(problem)
        optimizer.step()
        return optimizer

    for _ in range(2):
        step()
    return step


@pytest.mark.filterwarnings("ignore:`update_precision` is 'native'")
def test_a_step_of_every_method_reads_from_the_device_once(method: Method, make_problem: MakeProblem) -> None:
    step = bfloat16_step_of(method, "cpu", make_problem)
    with Operations() as operations, Reads() as reads:
        step()  # copies what the next one reads
        reads.names.clear(), operations.names.clear()
        optimizer = step()
    aligned = ["cpu", "tolist"] if optimizer.align_queries else []  # by numbers that the host has
    assert reads.names == ["tolist", *aligned]
    assert not {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"} & set(operations.names)


def test_indices_of_a_slice_lie_where_its_parameter_does() -> None:
    weight = nn.Parameter(torch.empty(4, 3, device="meta"))
    optimizer = MeZO([weight])
    optimizer.restrict({weight: Slice(0, torch.tensor([1, 2]))})
    assert optimizer.slices[weight].index.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("method", [MeZO, LOZO])
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("part", [None, Slice(0, torch.arange(1, 4))])
def test_a_step_waits_for_the_gpu_once(
    method: Callable[..., Any], num_queries: int, part: Slice | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, allowed = step_of(method, "cuda", part, num_queries=num_queries), []
    with waiting_is_an_error(monkeypatch, allowed):
        step()
    assert len(allowed) == 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:`update_precision` is 'native'")
def test_a_step_of_every_method_waits_for_the_gpu_once(
    method: Method, make_problem: MakeProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, allowed = bfloat16_step_of(method, "cuda", make_problem), []
    optimizer = step()
    if optimizer.align_queries or getattr(optimizer, "orthogonalization", "") == "svd":
        pytest.skip("eigenvectors and singular vectors are computed on the host, or by waiting for it")
    with waiting_is_an_error(monkeypatch, allowed):
        step()
    assert len(allowed) == 1


@pytest.mark.parametrize("num_queries", [1, 3])
def test_all_losses_are_asked_for_before_one_is_read(num_queries: int) -> None:
    net, events = nn.Linear(4, 1), []
    optimizer = MeZO(net.parameters(), seed=0, num_queries=num_queries)
    optimizer.attach(net)

    def loss() -> Tensor:
        events.append("loss")
        return net(torch.ones(2, 4)).square().mean()

    optimizer.estimate(loss)
    events.clear()

    class Noting(Reads):
        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if func.__name__ in READS:
                events.append("read")
            return func(*args, **(kwargs or {}))

    with Noting():
        optimizer.estimate(loss)
    assert events == ["loss"] * (2 * num_queries) + ["read"]


@pytest.mark.parametrize(
    "method",
    [
        *(MeZO, MeZOAdam, HiZOO, SparseMeZO, LOZO),
        partial(SubspaceMeZO, rank=2, betas=(0.9, 0.99)),
        partial(GRZO, rank=2, num_queries=3, estimator=TwoSided()),
    ],
)
def test_operations_of_an_update_do_not_grow_with_the_weights(method: Callable[..., Any]) -> None:
    if not native.available(torch.empty(2)):
        pytest.skip("torch's own loops are operations of torch")
    counts = []
    for layers in (2, 6):
        for optimizer in estimates(method, layers, width=4, count=2):
            with Operations() as operations:
                optimizer.step()
        views = {"promote_types", "view", "detach", "unbind", "split", "slice", "as_strided", "transpose"}
        counts.append([name for name in operations.names if name not in views])
    assert counts[0] == counts[1]
