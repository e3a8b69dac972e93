"""Keeps the memory that a recorded forward reads, whoever else drops it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OutsideMemory(TorchDispatchMode):
    """Keeps the memory of the tensors that operations read and have not made themselves.

    A graph reads it at each replay. That of weights and buffers stays as long as the modules hold them, but what a
    function has kept for one shape (``functools.lru_cache``) is dropped after others.

    Attributes:
        kept: this memory, by its address.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, UntypedStorage] = {}
        self._made: set[int] = set()  # addresses

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        read = _memory_of((args, kwargs))
        self.kept.update({address: memory for address, memory in read.items() if address not in self._made})
        output = func(*args, **(kwargs or {}))
        self._made.update(_memory_of(output))
        return output


def _memory_of(value: Any) -> dict[int, UntypedStorage]:
    found = {}
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            try:
                memory = leaf.untyped_storage()
                found[memory.data_ptr()] = memory
            except (NotImplementedError, RuntimeError):  # no memory of its own, such as a quantised weight
                continue
    return found
