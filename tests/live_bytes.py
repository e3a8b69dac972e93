"""Memory of what torch's operations return, counted on any device."""

import weakref
from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Notes how many bytes of what operations returned are alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.references: Counter[int] = Counter()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and (_storage(value) in self.sizes or _storage(value) not in given):
                self.sizes[_storage(value)] = value.untyped_storage().nbytes()
                self.references[_storage(value)] += 1
                weakref.finalize(value, self._free, _storage(value))
        self.peak = max(self.peak, sum(self.sizes.values()))
        return output

    def _free(self, storage: int) -> None:
        self.references[storage] -= 1
        if not self.references[storage]:
            del self.sizes[storage]


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
