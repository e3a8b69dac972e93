"""Snapshots of modules, to restore them from: attributes, containers, tensors, generators, forward hooks."""

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.evaluation.forward_hooks import ForwardHooks
from zolightning.evaluation.own_generators import are_equal, is_generator, set_state, state_of
from zolightning.evaluation.replaced import StandIn
from zolightning.evaluation.submodules import hold_the_same

_SMALL = 4096  # elements: copying smaller tensors costs less than finding out whether they are written to
_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
_NUMBERS = frozenset({bool, int, float, str, type(None)})  # which cannot change behind an attribute
_OURS = frozenset({"forward", "generate", "log"})  # attributes that this package sets while losses are evaluated
_SKIPPED = frozenset(vars(nn.Module())) | _OURS  # in addition to the bookkeeping of nn.Module
_NO_HOOKS = ForwardHooks()


class TensorSnapshot:
    """A tensor in a snapshot, with a copy of its values if it is known or likely to be written to."""

    __slots__ = ("copy", "key", "tensor", "version")

    def __init__(self, tensor: Tensor, is_copied: bool) -> None:
        self.tensor, self.key = tensor, id(tensor)
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
        """Puts its values back if it may have been written to; without a copy, notes in `written` that it needs one."""
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


class ModuleSnapshot:
    """The snapshot of one module.

    Args:
        attributes: ``vars(module)``.
        written: ids of tensors that are known to be written to, which are copied whatever their size.
        perturbed: ids of parameters, which are left out.
        known: by id, the tensors that the snapshots of other modules hold; those of this one are added.
    """

    __slots__ = ("attributes", "containers", "contents", "generators", "has_only_registries", "saved", "tensors")

    def __init__(
        self, attributes: dict[str, Any], written: Set[int], perturbed: Set[int], known: dict[int, TensorSnapshot]
    ) -> None:
        self.attributes, self.saved = attributes, dict(attributes)
        self.containers: list[Any] = []
        self.contents: list[Any] = []  # of the containers
        self.generators: list[tuple[Any, Any]] = []  # and their states
        self.tensors: list[TensorSnapshot] = []

        for name in ("_parameters", "_buffers"):
            if held := self.saved.get(name):
                self._visit(held, written, perturbed, known)
        registries = len(self.containers)
        for name, value in self.saved.items():
            if type(value) not in _NUMBERS and name not in _SKIPPED:
                self._visit(value, written, perturbed, known)
        self.has_only_registries = len(self.containers) == registries and not self.generators

    # A method, since a nested function that calls itself keeps the tensors alive until garbage is collected
    def _visit(self, value: Any, written: Set[int], perturbed: Set[int], known: dict[int, TensorSnapshot]) -> None:
        kind = type(value)
        if kind in _CONTAINERS:
            self.containers.append(value)
            self.contents.append(copy.copy(value))
            for member in value.values() if isinstance(value, dict) else value:
                if type(member) not in _NUMBERS:
                    self._visit(member, written, perturbed, known)
        elif kind is tuple:
            for member in value:
                self._visit(member, written, perturbed, known)
        elif kind is nn.Parameter or isinstance(value, Tensor):
            if id(value) in known:
                self.tensors.append(known[id(value)])
            elif id(value) not in perturbed and not value.is_inference() and not _holds_more(value):
                is_small = value.numel() <= _SMALL and not isinstance(value, nn.Parameter) and not value.is_meta
                known[id(value)] = TensorSnapshot(value, is_small or id(value) in written)
                self.tensors.append(known[id(value)])
        elif is_generator(value):
            self.generators.append((value, state_of(value)))

    def restore(self) -> None:
        """Restores everything but tensors."""
        if not _same_attributes(self.attributes, self.saved):
            _restore_attributes(self.attributes, self.saved)
        for container, content in zip(self.containers, self.contents, strict=True):
            if not _same(container, content):
                _refill(container, content)
        for generator, state in self.generators:
            set_state(generator, state)


def _holds_more(tensor: Tensor) -> bool:
    """Whether it is a parameter of a class of its own that keeps what its numbers mean beside them, and may change both
    (bitsandbytes, at the first forward on a CPU): with the numbers alone put back it would be another one."""
    kind = type(tensor)
    return kind is not nn.Parameter and issubclass(kind, nn.Parameter) and bool(vars(tensor))


Lasting = Sequence[ModuleSnapshot | None]


class Snapshot:
    """The snapshot of some modules.

    Args:
        modules: all submodules of the network.
        written: ids of tensors that are known to be written to, which are copied whatever their size.
        perturbed: ids of parameters, which are left out.
        earlier: the result of :meth:`lasting` of an earlier snapshot of these modules with the same `perturbed`.
        hooks: their forward hooks, if these are to be restored too.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        written: set[int],
        perturbed: Set[int],
        earlier: Lasting = (),
        hooks: ForwardHooks = _NO_HOOKS,
    ) -> None:
        self._written = written
        self._hooks, self._hooks_then = hooks, hooks.now()
        found = _unchanged(modules, earlier)
        known = {tensor.key: tensor for held in found if held is not None for tensor in held.tensors}
        self._held = [
            ModuleSnapshot(vars(module), written, perturbed, known) if held is None else held
            for module, held in zip(modules, found, strict=True)
        ]
        self._tensors = list(known.values())

    def lasting(self) -> Lasting:
        """The snapshot of each module that a later :class:`Snapshot` can reuse if nothing has changed, or None.

        :func:`_are_identical` can tell that, as long as all tensors are without a copy.
        """
        return [
            held if held.has_only_registries and all([tensor.copy is None for tensor in held.tensors]) else None
            for held in self._held
        ]

    def large(self) -> list[TensorSnapshot]:
        """The tensors without a copy."""
        return [tensor for tensor in self._tensors if tensor.copy is None]

    def holds_the_same(self) -> bool:
        """Whether attributes and containers are the same; what is in tensors may differ."""
        try:
            has_same_contents = all([held.containers == held.contents for held in self._held])
        except Exception:  # see `_same`
            return False
        return has_same_contents and _have_same_attributes(self._held)

    def has_written(self, device_type: str) -> bool:
        """Whether a tensor on a kind of device may have other values now."""
        return any([t.is_written(self._written) for t in self._tensors if t.tensor.device.type == device_type])

    def is_now(self) -> bool:
        """Whether the modules are still in this state."""
        if not self.holds_the_same() or self._hooks.now() != self._hooks_then:
            return False
        for held in self._held:
            if held.generators and not all(are_equal(state_of(g), state) for g, state in held.generators):
                return False
        return not any([tensor.is_written(self._written) for tensor in self._tensors])

    def restore(self) -> None:
        """Restores all of it."""
        self._hooks.restore(self._hooks_then)
        for held in self._held:
            held.restore()
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for tensor in self._tensors:
                tensor.restore(self._written)


def _unchanged(modules: Sequence[nn.Module], earlier: Lasting) -> Lasting:
    """The `earlier` snapshots of modules that hold what they held then; None for each of the others."""
    if not earlier:
        return [None] * len(modules)
    found = [
        held if held is not None and held.attributes is module.__dict__ else None
        for module, held in zip(modules, earlier, strict=True)
    ]
    if _are_identical([held for held in found if held is not None]):  # as a rule; then none is looked at by itself
        return found
    return [held if held is not None and _are_identical([held]) else None for held in found]


def _are_identical(snapshots: Sequence[ModuleSnapshot]) -> bool:
    """Whether modules hold the same tensors as in their lasting snapshots, and none of these has been written to."""
    registries = [registry for held in snapshots for registry in held.containers]
    contents = [content for held in snapshots for content in held.contents]
    return (
        _have_same_attributes(snapshots)
        and hold_the_same(registries, contents)
        and all([tensor.tensor._version == tensor.version for held in snapshots for tensor in held.tensors])
    )


def _have_same_attributes(snapshots: Iterable[ModuleSnapshot]) -> bool:
    """Whether modules have attributes that are equal to those in their snapshots."""
    pairs = [(held.attributes, held.saved) for held in snapshots]
    try:  # most are equal, which calls nothing in Python
        return all([now == saved or _same_attributes(now, saved) for now, saved in pairs])
    except Exception:  # see `_same`
        return False


def _same(now: Any, saved: Any) -> bool:
    """Whether two values are equal; members of containers that are the same object count as equal."""
    try:
        return bool(now == saved)
    except Exception:  # for example of two tensors with several elements, which are then not the same object
        return False


def _same_attributes(now: dict[str, Any], saved: dict[str, Any]) -> bool:
    if not _OURS.isdisjoint(now):
        now, saved = _own_attributes(now, saved), _own_attributes(saved, saved)
    return _same(now, saved)


def _own_attributes(attributes: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Attributes without what this package has put in their place."""
    own = {name: value for name, value in attributes.items() if name not in _OURS or (name in saved and name != "log")}
    while isinstance(forward := own.get("forward"), StandIn):
        own["forward"] = forward.args[0]
    return own


def _restore_attributes(attributes: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in attributes.keys() - saved.keys() - _OURS:
        del attributes[name]
    for name, value in saved.items():
        if name not in _OURS and attributes.get(name, attributes) is not value:
            attributes[name] = value


def _refill(container: Any, content: Iterable[Any]) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list | deque) else container.update(content)
