"""Steps of an optimizer on a small module, their directions, and comparisons of all bits that they leave."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import METHODS
from zolightning.directions.dense import Direction
from zolightning.kernels.noise import Key, NoiseKind, coefficient
from zolightning.optim import StepRecord, SubspaceOptimizer, ZerothOrderOptimizer

Method = Callable[..., ZerothOrderOptimizer]
MakeProblem = Callable[..., nn.Module]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Each row of the table, and the first one of each class in float16: it differs from bfloat16 in where the rest of a
# weight is kept, which is the same for all rows of a class.
_FIRST_OF_CLASS = {method.func: name for name, method in reversed(METHODS.items())}
METHODS_AND_DTYPES = pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *((name, dtype) for name in METHODS for dtype in (torch.float32, torch.bfloat16)),
        *((name, torch.float16) for name in _FIRST_OF_CLASS.values()),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
    indirect=["method"],
)


def bits(tensor: Tensor) -> Tensor:
    """The stored bits, also under a context that perturbs what is read."""
    with torch._C.DisableTorchFunction():
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        return tensor.detach().clone().view(integer)


def weights(problem: nn.Module) -> dict[str, Tensor]:
    """All of the training: what a checkpoint has, where an attached method keeps a part of it elsewhere."""
    with torch._C.DisableTorchFunction():
        return {name: bits(weight) for name, weight in problem.state_dict().items()}


def attached(method: Method, problem: nn.Module, params: Any = None, **kwargs: Any) -> ZerothOrderOptimizer:
    optimizer = method(problem.named_parameters() if params is None else params, **kwargs)
    optimizer.attach(problem)
    return optimizer


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]) is (name not in but), name


def assert_same_state(found: ZerothOrderOptimizer, expected: ZerothOrderOptimizer) -> None:
    one, other = found.state_dict(), expected.state_dict()
    assert one["param_groups"] == other["param_groups"]
    for index in one["state"].keys() | other["state"].keys():
        twins, entries = (state["state"].get(index, {}) for state in (one, other))
        assert twins.keys() == entries.keys()
        for name, value in entries.items():
            twin = twins[name]
            if isinstance(value, Tensor):
                assert twin.dtype == value.dtype and torch.equal(twin, value)
            else:
                assert twin == value


def run(problem: nn.Module, optimizer: ZerothOrderOptimizer, steps: int) -> list[StepRecord]:
    records = []
    for _ in range(steps):
        records.append(optimizer.estimate(problem))
        optimizer.step()
    return records


def standard(shape: Sequence[int], key: Key, kind: NoiseKind = "gaussian") -> Tensor:
    """One direction of unit variance, fp32, as a tensor."""
    total = torch.zeros(tuple(shape), dtype=torch.float32)
    keys = torch.tensor([key], dtype=torch.int32)
    coefficients = torch.tensor([coefficient(1.0, kind)], dtype=torch.float32)
    Direction(keys, coefficients, kind).accumulate(total)
    return total


def estimates(method: Callable[..., Any], layers: int, width: int, count: int) -> Iterator[ZerothOrderOptimizer]:
    """An optimizer of a stack of linear layers, after each of some estimates; its cores wait."""
    net = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    optimizer = attached(method, net, seed=0)
    if isinstance(optimizer, SubspaceOptimizer):
        optimizer.fold_every_step = False
    for _ in range(count):
        optimizer.estimate(lambda: net(torch.ones(2, width)).square().mean())
        yield optimizer
