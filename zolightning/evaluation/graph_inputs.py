"""Copies at fixed addresses, for CUDA graphs: of a network's arguments, and of the tensors inside perturbations.

A graph replays its launches with the addresses that they were recorded with. It is therefore recorded with copies of
all tensors (:class:`Tables`), into which those of the current call are copied before a replay. :class:`Arguments` and
:class:`Parts` say which tensors these are, and describe everything else in a `key`: a graph may be replayed if the key
is the one that it was recorded with.
"""

import copy
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from zolightning.directions.dense import Direction
from zolightning.directions.low_rank import LowRank
from zolightning.directions.opposite import Opposite
from zolightning.directions.perturbation import Uncopied
from zolightning.directions.slices import SlicedPerturbation
from zolightning.evaluation.perturbed import Perturbations

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout})

# Perturbations whose opposite differs only in the negated coefficients of directions
_BY_COEFFICIENTS = (Direction.opposite, LowRank.opposite, SlicedPerturbation.opposite)
_OF_DIRECTIONS = frozenset({"keys", "coefficients", "kind", "values", "first"})  # attributes of every direction


class CannotCapture(Exception):
    """A forward cannot be recorded as a graph; the message says why."""


class Arguments:
    """The arguments of a call, divided into tensors and a hashable description of everything else.

    Attributes:
        tensors: the tensors among them, in order.
        key: equal for calls that differ only in the values of their tensors.

    Raises:
        CannotCapture: if a value is neither a tensor on `device` nor plain.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> None:
        self._leaves, self._structure = tree_flatten((args, kwargs))
        self.tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        for tensor in self.tensors:
            if tensor.device != device:
                raise CannotCapture(f"an argument of the network is on {tensor.device}, not on {device}")
        self.key: Hashable = (self._structure, *[_described(leaf) for leaf in self._leaves])

    def with_tensors(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """These arguments with other tensors in place of their own."""
        others = iter(tensors)
        leaves = [next(others) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._structure)
        return args, kwargs


class Parts:
    """The perturbations of some groups of rows, divided into their tensors and a hashable description of the rest.

    For example, all directions of one of MeZO's queries read their keys from one table and share a tensor of
    coefficients. These two are the `tables`; the key says which parameters have such a direction, and where in the
    table the keys of each begin. In the next step both tables hold new numbers, but the key is the same.

    Args:
        groups: how each group of rows sees parameters.
        device: the device of the tensors.

    Attributes:
        tables: the tensors; one entry for all tensors that are views of the same one.
        constant: the places in `tables` of those that nobody writes to: factors of bases.
        key: equal for perturbations of the same parameters that differ only in the values of `tables`.

    Raises:
        CannotCapture: if a perturbation holds something that is neither a tensor on `device` nor plain, nor made of
            these.
    """

    def __init__(self, groups: Sequence[Perturbations], device: torch.device) -> None:
        self._groups = groups
        self._device = device
        self.tables: list[Tensor] = []
        self.constant: set[int] = set()
        self._places: dict[int, int] = {}  # in `tables`, by id
        self._known: dict[int, Hashable] = {}  # descriptions of objects, which several parameters may share, by id
        self._has_opposites = len(groups) > 1
        self._alike: dict[Hashable, tuple[int, Any]] = {}  # the number of each kind of direction, and its first offset
        self._directions: dict[int, Direction] = {}  # one for each tensor of coefficients, by its id
        self._kinds: set[type] = set()  # the classes of what perturbations consist of, besides plain directions
        described: list[Hashable] = [len(group) for group in groups]
        numbers: dict[int, int] = {}  # of groups, by id
        for number, group in enumerate(groups):
            if isinstance(group, Opposite) and id(group.of) in numbers:
                described += Opposite, numbers[id(group.of)]
                for direction in self._directions.values():
                    self._place(group.negated(direction).table)
                continue
            numbers[id(group)] = number
            described += map(id, group)
            described += [
                self._direction(change) if type(change) is Direction else self._described(change)
                for _, change in group.items()
            ]
        self.key: Hashable = (*described, *[(t.shape, t.stride(), t.dtype) for t in self.tables])

    @staticmethod
    def of(groups: Sequence[Perturbations], device: torch.device, known: dict[int, "Parts"]) -> "Parts":
        """The parts of some groups; of a single one they are known from its opposite, or from an earlier call.

        Args:
            groups: how each group of rows sees parameters.
            device: of the tensors.
            known: the parts of single groups, by the group's id; new ones are added. Parts keep their groups alive, so
                that no other object gets that id.
        """
        if len(groups) > 1:
            return Parts(groups, device)
        group, found = groups[0], known.get(id(groups[0]))
        if found is None and isinstance(group, Opposite) and id(group.of) in known:
            found = known[id(group.of)].opposite(group)
        known[id(group)] = found = found or Parts(groups, device)
        return found

    def opposite(self, changes: Opposite) -> "Parts | None":
        """The parts of the opposite of the one group; None if it differs in more than the contents of the tables."""
        if any(getattr(kind, "opposite", None) not in (None, *_BY_COEFFICIENTS) for kind in self._kinds):
            return None
        made = copy.copy(self)
        made._groups, made.tables, made._places = [changes], list(self.tables), dict(self._places)
        for direction in self._directions.values():
            if direction.coefficients._base is not None:
                return None
            negated, place = changes.negated(direction).table, self._places[id(direction.coefficients)]
            made.tables[place], made._places[id(negated)] = negated, place
        return made

    def with_tables(self, tables: Sequence[Tensor]) -> list[Perturbations]:
        """These perturbations with other tables in place of their own."""

        @functools.cache
        def exchanged(tensor: Tensor) -> Tensor:
            table = tensor if tensor._base is None else tensor._base  # of which it is a view
            offset = tensor.storage_offset() - table.storage_offset()
            return tables[self._places[id(table)]].as_strided(tensor.shape, tensor.stride(), offset)

        return [
            {parameter: _rebuilt(change, exchanged) for parameter, change in group.items()} for group in self._groups
        ]

    def _described(self, value: Any) -> Hashable:
        """A description of `value` without the values of its tensors. It runs for each parameter in each forward."""
        kind = type(value)
        if kind is Direction:
            return self._direction(value)
        if kind is LowRank:
            return self._low_rank(value)
        if kind in _PLAIN or (kind is tuple and _PLAIN.issuperset(map(type, value))):
            return value
        if kind is Uncopied:
            return self._uncopied(value.tensor)
        known = self._known.get(key := id(value))
        if known is not None:
            return known
        self._kinds.add(kind)
        found: Hashable
        if isinstance(value, Tensor):
            found = self._tensor(value)
        elif isinstance(value, Direction):
            own = [self._described(part) for name, part in vars(value).items() if name not in _OF_DIRECTIONS]
            found = (kind, self._direction(value), tuple(own))
        else:
            parts = value if kind is tuple else _members(value).values()
            found = (kind, *[part if type(part) in _PLAIN else self._described(part) for part in parts])
        self._known[key] = found
        return found

    def _uncopied(self, tensor: Tensor) -> Hashable:
        if tensor.device != self._device:
            raise CannotCapture(f"a tensor of a perturbation is on {tensor.device}, not on {self._device}")
        return Uncopied, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype

    def _tensor(self, tensor: Tensor) -> Hashable:
        table = tensor._base
        if table is None:
            return Tensor, self._place(tensor)
        start = tensor.storage_offset() - table.storage_offset()
        return Tensor, self._place(table), start, tensor.shape, tensor.stride()

    def _low_rank(self, change: LowRank) -> Hashable:
        direction = None if change.direction is None else self._described(change.direction)
        pending = None if change.pending is None else self._tensor(change.pending)
        count = len(self.tables)
        own = [None if factor is None else self._tensor(factor) for factor in (change.basis.left, change.basis.right)]
        self.constant.update(range(count, len(self.tables)))
        return LowRank, change.shape, direction, pending, *own

    def _direction(self, direction: Direction) -> Hashable:
        """The description of a direction; of one like an earlier one, its number and how far apart their keys are.

        With several groups `values` are part of it, because they show which directions are opposites. With one group
        they only repeat what is in a table.
        """
        keys = direction.keys
        table, start = keys._base, keys.storage_offset()
        values = direction.values if self._has_opposites else None
        like = id(table), id(direction.coefficients), direction.kind, direction.first, keys.shape, keys.stride(), values
        if like in self._alike:
            number, first = self._alike[like]
            return Direction, number, start - first
        if table is not None:
            self._alike[like] = len(self._alike), start
        self._directions[id(direction.coefficients)] = direction
        noise = self._described(keys), self._described(direction.coefficients)
        return Direction, direction.kind, direction.first, values, *noise

    def _place(self, table: Tensor) -> int:
        place = self._places.setdefault(id(table), len(self.tables))
        if place == len(self.tables):
            if table.device != self._device:
                raise CannotCapture(f"a tensor of a perturbation is on {table.device}, not on {self._device}")
            self.tables.append(table)
        return place


class Tables:
    """Copies of the tensors inside perturbations, at fixed addresses.

    Attributes:
        groups: the perturbations of `parts`, with these copies as their tensors.
    """

    def __init__(self, parts: Parts) -> None:
        static = [static_copy(table) for table in parts.tables]
        self._copies = [_without_repeats(table).detach() for table in static]
        self._sources: list[ref[Tensor] | None] = [None] * len(static)  # not kept alive: bases are as large as copies
        self._step = 0
        self.groups = parts.with_tables(static)

    def fill(self, parts: Parts, step: int) -> None:
        """Copies the tensors that may have changed since the last call: within a step none does, and a basis never."""
        new = [
            (copy, table)
            for i, (copy, table, source) in enumerate(zip(self._copies, parts.tables, self._sources, strict=True))
            if source is None or table is not source() or (step != self._step and i not in parts.constant)
        ]
        if new:
            torch._foreach_copy_([copy for copy, _ in new], [_without_repeats(table) for _, table in new])
        self._sources, self._step = [ref(table) for table in parts.tables], step


def static_copy(tensor: Tensor) -> Tensor:
    """An uninitialised tensor with the layout of another one."""
    whole = _without_repeats(tensor)
    made = torch.empty_strided(whole.shape, whole.stride(), dtype=tensor.dtype, device=tensor.device)
    return made.as_strided(tensor.shape, tensor.stride()).requires_grad_(tensor.requires_grad)


def copy_into(static: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies the values of tensors into their :func:`static_copy`."""
    if static:
        torch._foreach_copy_([_without_repeats(t).detach() for t in static], [_without_repeats(t) for t in sources])


def _without_repeats(tensor: Tensor) -> Tensor:
    """The part that an expanded tensor repeats; the tensor itself if it is not expanded."""
    if 0 not in tensor.stride():
        return tensor
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]


def _described(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad
    if type(leaf) in _PLAIN:
        return type(leaf), leaf
    raise CannotCapture(f"an argument of the network is {type(leaf).__name__}, neither a tensor nor a plain value")


def _members(value: Any) -> dict[Any, Any]:
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    try:
        return vars(value)
    except TypeError:
        raise CannotCapture(f"a perturbation is made of {type(value).__name__}, whose tensors are not known") from None


def _rebuilt(value: Any, exchanged: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return exchanged(value)
    if type(value) in _PLAIN or isinstance(value, Uncopied):
        return value
    members = {name: _rebuilt(member, exchanged) for name, member in _members(value).items()}
    if isinstance(value, list | tuple):
        return type(value)(members.values())
    made = copy.copy(value)
    vars(made).update(members)
    return made
