"""Snapshots of modules, to restore them from: attributes, contents of containers, tensors, generators."""

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence, Set
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

_SMALL = 4096  # elements: copying smaller tensors costs less than finding out whether they are written to
_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
_NUMBERS = frozenset({bool, int, float, str, type(None)})  # which cannot change behind an attribute
_OURS = frozenset({"forward", "generate"})  # attributes that this package sets while weights are perturbed
_SKIPPED = frozenset(vars(nn.Module())) | _OURS  # with the bookkeeping of nn.Module


class HeldTensor:
    """A tensor in a snapshot, with a copy of its values if it is known or likely to be written to."""

    __slots__ = ("copy", "tensor", "version")

    def __init__(self, tensor: Tensor, is_copied: bool) -> None:
        self.tensor = tensor
        self.version = tensor._version
        self.copy = tensor.detach().clone() if is_copied else None

    def add_copy(self) -> None:
        """Copies the tensor, before it is written to."""
        if self.copy is None:
            self.copy = self.tensor.detach().clone()

    def is_written(self, written: Set[int]) -> bool:
        """Whether it may have other values now, which is always assumed of tensors whose id is in `written`."""
        tensor = self.tensor
        if tensor._version != self.version or id(tensor) in written:
            return True
        # Writes through `.data` do not change the version. Comparing values on another device would wait for it.
        return self.copy is not None and tensor.is_cpu and not torch.equal(tensor, self.copy)

    def restore(self, written: set[int]) -> None:
        """Puts its values back if it may have been written to; without a copy, notes in `written` to make one next."""
        if not self.is_written(written):
            return
        tensor = self.tensor
        if self.copy is None:  # too late for this step
            written.add(id(tensor))
            self.copy = tensor.detach().clone()
        elif tensor.shape == self.copy.shape:
            tensor.detach().copy_(self.copy)
        else:
            tensor.data = self.copy.clone()
        self.version = tensor._version


class Held:
    """The snapshot of one module.

    Args:
        attributes: ``vars(module)``.
        written: ids of tensors that are known to be written to, which are copied whatever their size.
        perturbed: ids of parameters, which are left out.
        known: by id, the tensors that the snapshots of other modules hold; those of this one are added.
    """

    __slots__ = ("attributes", "containers", "contents", "generators", "own", "saved", "tensors")

    def __init__(
        self, attributes: dict[str, Any], written: Set[int], perturbed: Set[int], known: dict[int, HeldTensor]
    ) -> None:
        self.attributes, self.saved = attributes, dict(attributes)
        self.containers: list[Any] = []
        self.contents: list[Any] = []  # of the containers
        self.generators: list[tuple[torch.Generator, Tensor]] = []
        self.tensors: list[HeldTensor] = []

        def visit(value: Any) -> None:
            kind = type(value)
            if kind in _CONTAINERS:
                self.containers.append(value)
                self.contents.append(copy.copy(value))
                for member in value.values() if isinstance(value, dict) else value:
                    if type(member) not in _NUMBERS:
                        visit(member)
            elif kind is nn.Parameter or isinstance(value, Tensor):
                if id(value) in known:
                    self.tensors.append(known[id(value)])
                elif id(value) not in perturbed and not value.is_inference():
                    is_small = value.numel() <= _SMALL and not isinstance(value, nn.Parameter) and not value.is_meta
                    known[id(value)] = HeldTensor(value, is_small or id(value) in written)
                    self.tensors.append(known[id(value)])
            elif kind is torch.Generator:
                self.generators.append((value, value.get_state()))

        for name in ("_parameters", "_buffers"):
            if held := self.saved.get(name):
                visit(held)
        self.own = len(self.containers)  # how many of the containers are the module's registries
        for name, value in self.saved.items():
            if type(value) not in _NUMBERS and name not in _SKIPPED:
                visit(value)

    def holds_the_same(self) -> bool:
        """Whether attributes and containers are the same; what is in tensors may differ."""
        try:  # in line, for every module is looked at several times a step
            is_same = self.attributes == self.saved or _same_attributes(self.attributes, self.saved)
            return is_same and self.containers == self.contents
        except Exception:  # see `_same`
            return False

    def is_lasting(self) -> bool:
        """Whether :meth:`is_identical` can tell later if anything has changed: there are at most large tensors."""
        return (
            len(self.containers) == self.own
            and not self.generators
            and not any([tensor.copy is not None for tensor in self.tensors])
        )

    def is_identical(self) -> bool:
        """Whether the module holds the same tensors, and none of them has been written to."""
        if not _same_attributes(self.attributes, self.saved):
            return False
        for registry, content in zip(self.containers, self.contents, strict=True):
            if not all(map(is_, registry.values(), content.values())) or registry.keys() != content.keys():
                return False
        return all([tensor.tensor._version == tensor.version for tensor in self.tensors])

    def restore(self) -> None:
        """Restores everything but tensors."""
        if not _same_attributes(self.attributes, self.saved):
            _restore_attributes(self.attributes, self.saved)
        for container, content in zip(self.containers, self.contents, strict=True):
            if not _same(container, content):
                _refill(container, content)
        for generator, state in self.generators:
            generator.set_state(state)


class Snapshot:
    """The snapshot of some modules.

    Args:
        modules: all submodules of the network.
        written: ids of tensors that are known to be written to, which are copied whatever their size.
        perturbed: ids of parameters, which are left out.
        earlier: the result of :meth:`lasting` of an earlier snapshot with the same `perturbed`.
    """

    def __init__(
        self, modules: Sequence[nn.Module], written: set[int], perturbed: Set[int], earlier: Mapping[int, Held]
    ) -> None:
        self._written = written
        self._held: dict[int, Held] = {}
        known: dict[int, HeldTensor] = {}
        for module in modules:
            attributes = vars(module)
            held = earlier.get(id(module))
            if held is None or held.attributes is not attributes or not held.is_identical():
                held = Held(attributes, written, perturbed, known)
            elif held.tensors:
                known |= {id(tensor.tensor): tensor for tensor in held.tensors}
            self._held[id(module)] = held
        self._tensors = list(known.values())

    def lasting(self) -> dict[int, Held]:
        """The snapshots of modules, by their ids, that a later :class:`Snapshot` can reuse if nothing has changed."""
        return {key: held for key, held in self._held.items() if held.is_lasting()}

    def large(self) -> list[HeldTensor]:
        """The tensors without a copy."""
        return [tensor for tensor in self._tensors if tensor.copy is None]

    def holds_the_same(self) -> bool:
        """Whether attributes and containers are the same; what is in tensors may differ."""
        return all([held.holds_the_same() for held in self._held.values()])

    def is_now(self) -> bool:
        """Whether the modules are still in this state."""
        if not self.holds_the_same():
            return False
        for held in self._held.values():
            if held.generators and not all(torch.equal(g.get_state(), state) for g, state in held.generators):
                return False
        return not any([tensor.is_written(self._written) for tensor in self._tensors])

    def restore(self) -> None:
        """Restores all of it."""
        for held in self._held.values():
            held.restore()
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for tensor in self._tensors:
                tensor.restore(self._written)


def _same(now: Any, saved: Any) -> bool:
    """Whether two values are equal; members of containers that are the same object count as equal."""
    try:
        return bool(now == saved)
    except Exception:  # for example of two tensors with several elements, which are then not the same object
        return False


def _same_attributes(now: dict[str, Any], saved: dict[str, Any]) -> bool:
    if len(now) > len(saved):
        now = now.copy()
        for name in _OURS:
            if name not in saved:
                now.pop(name, None)
    return _same(now, saved)


def _restore_attributes(attributes: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in attributes.keys() - saved.keys() - _OURS:
        del attributes[name]
    for name, value in saved.items():
        if name not in _OURS and attributes.get(name, attributes) is not value:
            attributes[name] = value


def _refill(container: Any, content: Iterable[Any]) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list | deque) else container.update(content)
