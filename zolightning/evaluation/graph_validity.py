"""Tells whether CUDA graphs of a network are still valid: the same objects in its modules, at the same addresses, and
the same bits of output."""

from collections.abc import Hashable
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from zolightning.evaluation.snapshot import Snapshot

UNSETTLED = 3  # steps in a row, counting the first one, that may begin with other modules than the step before


class Validity:
    """Tells from step to step whether graphs of a network hold, and whether there can be any.

    Attributes:
        reason: why there can be none, as far as is known; empty otherwise.
    """

    def __init__(self, network: nn.Module) -> None:
        self.reason = ""
        self._network = network
        self._state: NetworkState | None = None  # in which all steps since the first graph began
        self._unsettled = 0  # steps in a row that began in a new state, or in which a run changed it
        self._is_changed = False  # whether a run in this step has

    def forget(self) -> None:
        """Forgets the state that graphs were recorded in, since there are none."""
        self._state = None

    def is_same(self) -> bool:
        """Whether the modules are in the state that graphs were recorded in."""
        return self._state is not None and self._state.is_same()

    def begin_step(self) -> None:
        """Begins a step in the state that graphs were recorded in, or in a new one if it has been forgotten."""
        is_new, was_changed = self._state is None, self._is_changed
        self._unsettled = self._unsettled + 1 if is_new or was_changed else 0
        self._is_changed = False
        self._state = self._state or NetworkState(self._network)
        if self._unsettled > UNSETTLED and was_changed:
            self.reason = "it changes what its modules hold, a buffer or a counter"
        elif self._unsettled > UNSETTLED:
            self.reason = "its parameters, buffers or attributes are replaced at each step"
        elif (hooked := self._state.hooked()) is not None:
            self.reason = f"`{hooked}` has a hook, which a replay would not call"

    def is_as_begun(self) -> bool:
        """Whether the modules are in the state in which the step began, and have no hooks that are not values."""
        with torch._C.DisableTorchFunction():
            return self._state is None or (self._state.is_same() and self._state.hooked() is None)

    def hooks(self) -> Hashable:
        """The hooks inside the network."""
        return () if self._state is None else self._state.hooks()

    def is_changed(self) -> bool:
        """Whether a run in this step has changed the state that it began in; to be asked after each run."""
        self._is_changed = self._is_changed or not self.is_as_begun()
        return self._is_changed


class NetworkState:
    """The objects that the modules of a network hold, the addresses of their tensors, and the values of those on a CPU.

    A graph reads the memory of the device at each replay, but numbers of the host when it is recorded.
    """

    def __init__(self, network: nn.Module) -> None:
        self._inner = [(name, module) for name, module in network.named_modules() if module is not network]
        self._snapshot = snapshot_of(network)
        self._settings = [(held, held.copy()) for held in map(vars, _settings_of(network))]
        self._tensors = [*network.parameters(), *network.buffers()]
        self._addresses = self._now()

    def is_same(self) -> bool:
        """Whether no object has been replaced or moved; the values in tensors on a device may differ."""
        try:
            has_same_settings = all([now == saved for now, saved in self._settings])
        except Exception:  # of two tensors with several elements
            return False
        return (
            has_same_settings
            and self._snapshot.holds_the_same()
            and self._addresses == self._now()
            and not self._snapshot.has_written("cpu")
        )

    def hooked(self) -> str | None:
        """The name of a module inside the network with a hook around its forward that is not a value."""
        return next((name for name, hook in self.hooks() if not _is_value(hook)), None)

    def hooks(self) -> tuple[tuple[str, Any], ...]:
        """The hooks around forwards of modules inside the network, with the names of these."""
        return tuple(
            (name, hook)
            for name, m in self._inner
            if m._forward_hooks or m._forward_pre_hooks
            for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())
        )

    def _now(self) -> list[int]:
        try:
            return list(map(Tensor.data_ptr, self._tensors))
        except (NotImplementedError, RuntimeError):
            return [_address(tensor) for tensor in self._tensors]


def snapshot_of(network: nn.Module) -> Snapshot:
    """A snapshot of what the modules of a network hold now, without its parameters."""
    return Snapshot(list(network.modules()), set(), {id(parameter) for parameter in network.parameters()})


def have_same_bits(one: Any, other: Any) -> bool:
    """Whether two structures are equal; tensors are compared bit by bit, so NaN equals NaN."""
    (leaves, structure), (others, other_structure) = tree_flatten(one), tree_flatten(other)
    return structure == other_structure and all(
        torch.equal(_bits(a), _bits(b)) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)
        for a, b in zip(leaves, others, strict=True)
    )


def _settings_of(network: nn.Module) -> list[Any]:
    """The objects behind attributes that are equal if what they hold is equal, such as a config; others may count."""
    values = {id(value): value for module in network.modules() for value in vars(module).values()}
    return [
        v
        for v in values.values()
        if not isinstance(v, Tensor | dict) and hasattr(v, "__dict__") and type(v).__eq__ is not object.__eq__
    ]


def _is_value(hook: Any) -> bool:
    """Whether an equal hook does the same, since both are frozen dataclasses."""
    return is_dataclass(hook) and type(hook).__hash__ not in (None, object.__hash__)


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except (NotImplementedError, RuntimeError):  # for a subclass that wraps other tensors, such as a quantised weight
        return 0


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
