"""What would make the host wait for a GPU, told by the operations that run on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_WAITS = frozenset({"equal", "nonzero", "_local_scalar_dense", "masked_select", "repeat_interleave"})


class Waits(TorchDispatchMode):
    """Keeps the names of operations whose result, or the size of it, the host has to read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
        if name in _WAITS or by_mask:
            self.found.append(name)
        return func(*args, **kwargs or {})


class HandedOver(TorchFunctionMode):
    """Functions that copy numbers of the host to a device and wait until they are there."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        makes = func in (torch.tensor, torch.as_tensor) and (kwargs or {}).get("device") is not None
        if makes or func is Tensor.new_tensor:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def waiting_is_an_error(monkeypatch: pytest.MonkeyPatch, allowed: list[int]) -> Iterator[None]:
    """But for ``Tensor.tolist``, whose calls are noted in `allowed` where it waits."""
    own = Tensor.tolist

    def tolist(tensor: Tensor) -> Any:
        if not tensor.is_cuda:
            return own(tensor)
        torch.cuda.set_sync_debug_mode("default")
        allowed.append(tensor.numel())
        try:
            return own(tensor)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(Tensor, "tolist", tolist)
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
