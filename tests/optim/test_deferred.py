"""A deferred tensor is read, copied and saved as the one that it stands for, and takes no memory until then."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from zolightning.optim.deferred import Deferred, defer, deferring

TENSORS: dict[str, Callable[[], Tensor]] = {
    "fp32": lambda: torch.arange(12.0).view(3, 4),
    "bf16": lambda: torch.arange(12.0).view(3, 4).bfloat16(),
    "channels_last": lambda: torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.arange(12.0).view(3, 4).t(),
    "no elements": lambda: torch.ones(0, 3),
    "one number": lambda: torch.tensor(3.0),
}


@pytest.fixture(params=TENSORS)
def tensor(request: pytest.FixtureRequest) -> Tensor:
    return TENSORS[request.param]()


def deferred(tensor: Tensor) -> Tensor:
    with deferring():
        return defer(tensor.clone, like=torch.empty_like(tensor))


@pytest.mark.parametrize("weights_only", [False, True])
def test_torch_saves_what_it_stands_for(tensor: Tensor, weights_only: bool) -> None:
    plain, file = io.BytesIO(), io.BytesIO()
    torch.save({"a": tensor.clone(), "b": tensor}, plain)
    torch.save({"a": deferred(tensor), "b": tensor}, file)
    assert len(plain.getvalue()) == len(file.getvalue())
    file.seek(0)
    found = torch.load(file, weights_only=weights_only)
    for value in found.values():
        assert type(value) is Tensor and torch.equal(value, tensor)
        assert value.dtype == tensor.dtype and value.stride() == tensor.stride() and not value.requires_grad


def test_operations_read_it(tensor: Tensor) -> None:
    made = deferred(tensor)
    assert isinstance(made, Deferred) and made.shape == tensor.shape and made.dtype == tensor.dtype
    for read in (made.clone(), made + 0, made.detach(), copy.deepcopy(made), made.to(tensor.dtype, copy=True)):
        assert type(read) is Tensor and torch.equal(read, tensor)
    target = torch.empty_like(tensor)
    target.copy_(made)
    assert torch.equal(target, tensor)


def test_a_change_would_be_lost_and_is_refused() -> None:
    with pytest.raises(RuntimeError, match="clone it to change it"):
        deferred(torch.ones(3)).mul_(2)


def test_outside_of_the_context_nothing_is_deferred() -> None:
    assert type(defer(lambda: torch.ones(3), like=torch.ones(3))) is Tensor


def test_it_is_computed_when_it_is_written() -> None:
    calls: list[int] = []

    def compute() -> Tensor:
        calls.append(1)
        return torch.ones(3)

    with deferring():
        made = defer(compute, like=torch.empty(3))
    assert not calls
    torch.save(made, io.BytesIO())
    assert len(calls) == 1
