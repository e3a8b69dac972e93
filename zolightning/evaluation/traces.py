"""Only the first evaluation of a step leaves traces in the module.

A loss may change its module: running statistics, metrics (torchmetrics), counters, lists, a hidden state carried from
batch to batch, an exponential moving average of the weights in a teacher. Every evaluation of a step begins with the
state before the step, and after the step the module is in the state after the first evaluation.

Covered are buffers, frozen parameters, and attributes of submodules that are numbers, tensors, torch.Generator, or
lists, dictionaries, sets and deques of these. Other objects behind an attribute, and files, are not covered. The memory
is a copy of each tensor that an evaluation writes to, which is found out by watching the first one. If a large tensor
(above 4,096 elements) is written to for the first time in a later step, the other evaluations of that one step begin
with what the first one left in it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zolightning.evaluation.snapshot import Lasting, Snapshot, TensorSnapshot


class Traces:
    """Undoes what the evaluations of a step write; :meth:`finish` puts back what the first one wrote.

    Args:
        modules: all submodules of the network; none if only a function is known.
        written: ids of tensors that were written to in earlier steps; more are added.
        perturbed: ids of the parameters that the evaluations perturb.
        earlier: the result of :meth:`finish` of an earlier step with the same `modules` and `perturbed`.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        written: set[int],
        perturbed: Set[int],
        earlier: Lasting = (),
    ) -> None:
        self._modules = modules
        self._written = written
        self._perturbed = perturbed
        self._before = Snapshot(modules, written, perturbed, earlier)
        self._first: Snapshot | None = None

    def evaluate(self, evaluate: Callable[[], Any], is_first: bool) -> Any:
        """Evaluates a loss and undoes what it wrote, also where it fails; `is_first` keeps it for the end."""
        is_written = True
        try:
            result = evaluate()
            is_written = not self._before.is_now()
            if is_first and is_written:
                self._first = Snapshot(self._modules, self._written, self._perturbed, self._before.lasting())
            return result
        finally:
            if is_written:
                self._before.restore()

    @property
    def found(self) -> bool:
        """Whether the first evaluation wrote anything."""
        return self._first is not None

    def finish(self) -> Lasting:
        """Puts the module into the state after the first evaluation; returns what the next step takes as `earlier`."""
        if self._first is not None:
            self._first.restore()
        return self._before.lasting()

    def watched(self) -> "CopyOnWrite":
        """A context for the very first evaluation, which copies large tensors just before they are written to."""
        return CopyOnWrite(self._before, self._written)


class CopyOnWrite(TorchFunctionMode):
    """Copies tensors without a copy before a function of torch's writes to them."""

    def __init__(self, snapshot: Snapshot, written: set[int]) -> None:
        super().__init__()
        self._written = written
        self._by_storage: dict[int, list[TensorSnapshot]] = {}
        for large in snapshot.large():
            self._by_storage.setdefault(_storage(large.tensor), []).append(large)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._by_storage and _writes(func.__name__, kwargs):
            for tensor in _tensors((args[:1], kwargs.get("out"))):
                for owner in self._by_storage.get(_storage(tensor), ()):
                    owner.add_copy()
                    self._written.add(id(owner.tensor))
        return func(*args, **kwargs)


def _writes(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function writes to its first argument, or to `out`, by the naming rules of torch."""
    is_in_place = name.endswith("_") and not name.endswith("__")
    return is_in_place or name in ("__setitem__", "__set__") or name.startswith("__i") or "out" in kwargs


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _tensors(member)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # no memory of its own: sparse, meta, or inside a function transform
        return 0
