"""What would make the host wait for a GPU, told by the operations that run on a CPU."""

from typing import Any

import torch
from torch import Tensor
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
