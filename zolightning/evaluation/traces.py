"""Only the first evaluation of a step leaves traces in the module.

A loss may write as well as compute: running statistics, metrics (torchmetrics), counters, lists, a hidden state carried
from batch to batch, an exponential moving average of the weights in a teacher. Every evaluation of a step begins with
what was there before the step; afterwards the module has what the first one wrote, once, as one evaluation would have.

Covered is what submodules hold: buffers, frozen parameters, and attributes that are numbers, tensors, torch.Generator,
or lists, dictionaries, sets and deques of these. Other objects behind an attribute, and files, are not looked into.
Memory is a copy of each tensor that an evaluation writes to, found by watching the first one. Where a large tensor
(above 4,096 elements) is written for the first time later on, the other evaluations of that one step begin with what
the first one left.
"""

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SMALL = 4096  # elements up to which copying costs less than finding out
_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
_NUMBERS = frozenset({bool, int, float, str, type(None)})  # which cannot change behind an attribute
# Bookkeeping of nn.Module. `forward` is ours while weights are perturbed.
_SKIPPED = frozenset(vars(nn.Module())) | {"forward"}


class _Saved(NamedTuple):
    tensor: Tensor
    version: int
    copy: Tensor | None


class Snapshot:
    """What some modules hold at one moment.

    Args:
        modules: all submodules of the network.
        written: tensors that are known to be written to, by id; they are copied whatever their size.
        perturbed: parameters that are left alone, by id.
    """

    def __init__(self, modules: Sequence[nn.Module], written: set[int], perturbed: Set[int]) -> None:
        self._written = written
        self._perturbed = perturbed
        self._attributes = [(vars(module), dict(vars(module))) for module in modules]
        self._containers: list[tuple[Any, Any]] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        self._tensors: dict[int, _Saved] = {}
        for _, saved in self._attributes:
            for name in saved.keys() - _SKIPPED:
                value = saved[name]
                if type(value) not in _NUMBERS:
                    self._visit(value)
            for name in ("_parameters", "_buffers"):
                if held := saved.get(name):
                    self._visit(held)

    def _visit(self, value: Any) -> None:
        kind = type(value)
        if kind in _CONTAINERS:
            self._containers.append((value, copy.copy(value)))
            for member in value.values() if isinstance(value, dict) else value:
                if type(member) not in _NUMBERS:
                    self._visit(member)
        elif kind is nn.Parameter or isinstance(value, Tensor):
            self._save(value)
        elif kind is torch.Generator:
            self._generators.append((value, value.get_state()))

    def _save(self, tensor: Tensor) -> None:
        if id(tensor) in self._perturbed or tensor.is_inference():
            return
        is_copied = id(tensor) in self._written or (
            tensor.numel() <= _SMALL and not isinstance(tensor, nn.Parameter) and not tensor.is_meta
        )
        self._tensors[id(tensor)] = _Saved(tensor, tensor._version, tensor.detach().clone() if is_copied else None)

    def large(self) -> list[Tensor]:
        """The tensors without a copy."""
        return [saved.tensor for saved in self._tensors.values() if saved.copy is None]

    def add_copy(self, tensor: Tensor) -> None:
        """Copies a tensor, before it is written to."""
        saved = self._tensors[id(tensor)]
        if saved.copy is None:
            self._tensors[id(tensor)] = saved._replace(copy=tensor.detach().clone())

    def is_now(self) -> bool:
        """Whether nothing has been written since."""
        return (
            all(_same_attributes(attributes, saved) for attributes, saved in self._attributes)
            and all(_same(container, content) for container, content in self._containers)
            and all(torch.equal(generator.get_state(), state) for generator, state in self._generators)
            and not any(self._is_written(entry) for entry in self._tensors.values())
        )

    def restore(self) -> None:
        """Puts everything back as it was."""
        for attributes, saved in self._attributes:
            if not _same_attributes(attributes, saved):
                _restore_attributes(attributes, saved)
        for container, content in self._containers:
            if not _same(container, content):
                _refill(container, content)
        for generator, state in self._generators:
            generator.set_state(state)
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for entry in list(self._tensors.values()):
                self._restore_tensor(entry)

    def _restore_tensor(self, saved: _Saved) -> None:
        tensor = saved.tensor
        if not self._is_written(saved):
            return
        if saved.copy is None:  # too late for this step
            self._written.add(id(tensor))
            self._tensors[id(tensor)] = _Saved(tensor, tensor._version, tensor.detach().clone())
            return
        if tensor.shape == saved.copy.shape:
            tensor.detach().copy_(saved.copy)
        else:
            tensor.data = saved.copy.clone()
        self._tensors[id(tensor)] = saved._replace(version=tensor._version)

    def _is_written(self, saved: _Saved) -> bool:
        tensor = saved.tensor
        if tensor._version != saved.version or id(tensor) in self._written:
            return True
        # Writes through `.data` leave no mark. Looking at the values of another device would wait for it.
        return saved.copy is not None and tensor.is_cpu and not torch.equal(tensor, saved.copy)


class Traces:
    """Undoes what the evaluations of a step write; :meth:`finish` puts back what the first one wrote.

    Args:
        modules: all submodules of the network; none where only a function is known.
        written: tensors found to be written to in earlier steps, by id; added to.
        perturbed: parameters that the evaluations perturb, by id.
    """

    def __init__(self, modules: Sequence[nn.Module], written: set[int], perturbed: Set[int]) -> None:
        self._modules = modules
        self._written = written
        self._perturbed = perturbed
        self._before = Snapshot(modules, written, perturbed)
        self._first: Snapshot | None = None

    def evaluate(self, evaluate: Callable[[], Any], is_first: bool) -> Any:
        """Evaluates a loss and undoes what it wrote, also where it fails; `is_first` keeps it for the end."""
        try:
            result = evaluate()
        except BaseException:
            self._before.restore()
            raise
        if is_first:
            if self._before.is_now():
                return result
            self._first = Snapshot(self._modules, self._written, self._perturbed)
        self._before.restore()
        return result

    def finish(self) -> None:
        """Leaves the module as the first evaluation did."""
        if self._first is not None:
            self._first.restore()

    def watched(self) -> "CopyOnWrite":
        """A context for the first evaluation of all, which copies large tensors just before they are written to."""
        return CopyOnWrite(self._before, self._written)


class CopyOnWrite(TorchFunctionMode):
    """Copies tensors without a copy before a function of torch's writes to them."""

    def __init__(self, snapshot: Snapshot, written: set[int]) -> None:
        super().__init__()
        self._snapshot = snapshot
        self._written = written
        self._by_storage: dict[int, list[Tensor]] = {}
        for tensor in snapshot.large():
            self._by_storage.setdefault(_storage(tensor), []).append(tensor)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._by_storage and _writes(func.__name__, kwargs):
            for tensor in _tensors((args[:1], kwargs.get("out"))):
                for owner in self._by_storage.get(_storage(tensor), ()):
                    self._snapshot.add_copy(owner)
                    self._written.add(id(owner))
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
    except (NotImplementedError, RuntimeError):  # without memory of its own: sparse, meta, of a transform
        return 0


def _same(now: Any, saved: Any) -> bool:
    """Whether nothing is another object, or at least none that differs: Python looks at identities first."""
    try:
        return bool(now == saved)
    except Exception:  # two tensors of several elements, say: not the same object
        return False


def _same_attributes(now: dict[str, Any], saved: dict[str, Any]) -> bool:
    if len(now) == len(saved) + 1 and "forward" in now and "forward" not in saved:
        try:
            return now.items() >= saved.items()
        except Exception:  # as in `_same`
            return False
    return _same(now, saved)


def _restore_attributes(attributes: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in attributes.keys() - saved.keys() - {"forward"}:
        del attributes[name]
    for name, value in saved.items():
        if name != "forward" and attributes.get(name, attributes) is not value:
            attributes[name] = value


def _refill(container: Any, content: Iterable[Any]) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list | deque) else container.update(content)
