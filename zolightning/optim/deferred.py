"""Tensors that are computed when they are read, so that saving many of them needs the memory of one at a time."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_is_deferring = False


@contextmanager
def deferring() -> Iterator[None]:
    """A context in which :func:`defer` defers; its results must be read or saved before the next step."""
    global _is_deferring
    before, _is_deferring = _is_deferring, True
    try:
        yield
    finally:
        _is_deferring = before


def defer(compute: Callable[[], Tensor], like: Tensor) -> Tensor:
    """The result of `compute`, a tensor like `like`, computed now or, within :func:`deferring`, when it is read."""
    return Deferred(compute, like) if _is_deferring else compute()


class Deferred(Tensor):
    """A tensor that is computed anew by each operation that reads it, and by ``torch.save`` when it is written.

    Args:
        compute: makes the tensor, in a storage of its own.
        like: a tensor of the same shape, strides (if they are dense), dtype and device.
    """

    compute: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, compute: Callable[[], Tensor], like: Tensor) -> "Deferred":
        layout = torch.empty_like(like, device="meta")
        made = torch.Tensor._make_wrapper_subclass(
            cls, layout.shape, strides=layout.stride(), dtype=like.dtype, device=like.device
        )
        made.compute = compute
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # declared as if for an instance
        cls, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function._schema.is_mutable and args and isinstance(args[0], cls):
            raise RuntimeError("This tensor of a checkpoint is computed when it is read: clone it to change it.")
        args, kwargs = tree_map_only(cls, lambda tensor: tensor.compute(), (args, kwargs or {}))
        return function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.compute()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as a plain tensor whose storage computes its bytes when torch writes them."""
        storage = torch.storage.TypedStorage(wrap_storage=_Storage(self), dtype=self.dtype, _internal=True)
        storage._fake_device = self.device  # the device that the tensor reports, as for a plain tensor
        return torch._utils._rebuild_tensor_v2, (storage, 0, tuple(self.shape), self.stride(), False, OrderedDict())


class _Storage(torch.UntypedStorage):
    """A storage without memory: ``torch.save`` calls :meth:`cpu` on storages of other devices when it writes them."""

    tensor: Deferred

    def __new__(cls, tensor: Deferred) -> "_Storage":
        size = tensor.numel() * tensor.element_size()
        made = super().__new__(cls, size, device="meta")  # type: ignore[call-arg]  # torch declares no constructor
        made.tensor = tensor
        return made

    def cpu(self) -> torch.UntypedStorage:
        return self.tensor.compute().untyped_storage().cpu()
