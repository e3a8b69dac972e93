"""A context in which the rows of a batch come in groups, and each group sees perturbations of its own.

A function that reads a perturbed parameter runs once for all groups if it is a low-rank product or multiplies by a
gain, and otherwise once for each group's rows. Products and embeddings write all groups' rows to one output.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning.directions.dense import Direction
from zolightning.directions.low_rank import LowRank, stacked_product
from zolightning.directions.perturbation import Perturbation
from zolightning.evaluation.nested import map_tensors, tensors_in
from zolightning.evaluation.perturbed import Perturbed
from zolightning.evaluation.scratch import PIECE_BYTES, pieces
from zolightning.evaluation.small_tensors import cores_of_groups
from zolightning.evaluation.torch_functions import (
    HOST,
    PRODUCTS,
    ByRows,
    factors_of,
    is_transformed,
    multiply,
    table_of,
)

_ELEMENTWISE = frozenset({Tensor.mul, Tensor.add, torch.mul, torch.add})


class CannotStack(Exception):
    """The evaluations of a step cannot share a run of the network; the message says why."""


class RowGroups(Perturbed):
    """A context in which the rows of a batch come in groups, and each group sees parameters perturbed in its own way.

    Args:
        groups: the context of each group; none of them perturbs in place.
        rows: number of rows of all groups together. Tensors whose first dimension is a multiple of it are split.
        held: by their ids, the names of the network's own tensors, which are not split whatever their shape.
        memory: where the network's buffers are stored, of which views are not split either: Swin reads its position
            biases by the flattened indices in a buffer, which may be a multiple of the rows.
    """

    def __init__(
        self, groups: Sequence[Perturbed], rows: int, held: Mapping[int, str], memory: Set[int] = frozenset()
    ) -> None:
        _refuse_transforms()
        super().__init__(perturbed_by(groups), scratch=groups[0].scratch, readers=groups[0].readers)
        self.groups = groups
        self.rows = rows
        self.held = held
        self.memory = memory
        self.cuts: list[tuple[Any, ...]] = []  # for each call: function, parameters read, which tensors were split
        self._cores: dict[int, Tensor] | None = None  # all groups' cores by the parameter's id, made at the first read

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch._C.DisableTorchFunction():  # contexts around this one must not see the calls made in here
            return self._run(func, args, kwargs)

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _refuse_transforms()
        tensors = _arguments(args, kwargs)
        cut = [self._has_rows(tensor) for tensor in tensors]
        held = [id(tensor) for tensor in tensors if id(tensor) in self.held]
        self.cuts.append((func, *held, *cut))
        self.groups[0].seen.update(name for name in held if name in self._ids)
        if func in PRODUCTS and (output := self._stacked_product(func, args, kwargs)) is not None:
            return output
        if func in PRODUCTS and (output := self._product_of_each(func, args, kwargs)) is not None:
            return output
        if func is F.embedding and (output := self._lookup_of_each(args, kwargs)) is not None:
            return output
        if func in _ELEMENTWISE and (output := self._broadcast(func, args, kwargs)) is not None:
            return output
        count = len(self.groups)
        outputs = []
        for index, group in enumerate(self.groups):

            def part(tensor: Tensor, index: int = index) -> Tensor:
                return tensor.chunk(count)[index] if self._has_rows(tensor) else tensor

            own_args, own_kwargs = map_tensors(part, (args, kwargs))
            outputs.append(group.run(func, own_args, own_kwargs))
        if not any(cut):
            outputs = [self._spread(output, index, tensors) for index, output in enumerate(outputs)]
        return _joined(outputs)

    def _has_rows(self, tensor: Tensor) -> bool:
        is_multiple = bool(tensor.ndim) and len(tensor) % self.rows == 0 and id(tensor) not in self.held
        if not is_multiple or not self.memory or not tensor.stride(0):  # one row repeated is the same for all groups
            return is_multiple
        return tensor.untyped_storage().data_ptr() not in self.memory

    def _spread(self, output: Any, index: int, tensors: list[Tensor]) -> Tensor:
        """A group's rows of an output computed without rows of the batch, such as position embeddings."""
        group_rows = self.rows // len(self.groups)
        if isinstance(output, Tensor) and output.ndim > 1 and len(output) in (1, self.rows):
            return output.expand(self.rows, *output.shape[1:])[:group_rows]
        names = ", ".join(f"`{self.held[id(tensor)]}`" for tensor in tensors if id(tensor) in self.held)
        raise CannotStack(f"the network reads {names} without the rows of a batch")

    def _stacked_product(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """The output of a product whose groups have low-rank perturbations in one basis; None for other products."""
        weight, inputs, bias = factors_of(func, args)
        found = [p for group in self.groups if isinstance(p := group.perturbations.get(weight), LowRank)]
        if kwargs or len(found) < len(self.groups) or not self._has_rows(inputs):
            return None
        return stacked_product(found, func, inputs, weight.detach(), self._vectors(bias), self._cores_of(weight))

    def _cores_of(self, weight: nn.Parameter) -> Tensor | None:
        """The cores of all groups, made together with those of other small matrices, where launches take time."""
        device = weight.device.type
        is_recorded = device == "cuda" and torch.cuda.is_current_stream_capturing()
        if device == HOST or is_recorded or torch.is_grad_enabled():
            return None
        if self._cores is None:
            self._cores = cores_of_groups({parameter: self._changes(parameter) for parameter in self.perturbations})
        return self._cores.get(id(weight))

    def _product_of_each(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """The output of a product in which each group has its own weight; None for other calls.

        ``F.linear`` is computed in pieces of the weight's rows, so that the weights of two groups together take at most
        ``PIECE_BYTES``.
        """
        weight, inputs, bias = factors_of(func, args)
        if (
            kwargs
            or id(weight) not in self._ids
            or not self._has_rows(inputs)
            or inputs.ndim < 2
            or weight.ndim != 2
            or (bias is not None and bias.ndim != 1)
            or inputs.dtype != weight.dtype
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(weight.device.type)
        ):
            return None
        is_linear = func is F.linear
        rows = inputs.reshape(-1, inputs.shape[-1])
        output = rows.new_empty(len(rows), weight.shape[0 if is_linear else 1])
        parts, columns = rows.chunk(len(self.groups)), output.chunk(len(self.groups))
        biases = self._vectors(bias)
        changes = self._changes(weight)
        is_cut = is_linear and all(isinstance(change, ByRows | None) for change in changes)
        cut = pieces(weight, PIECE_BYTES // 2) if is_cut else [slice(0, len(weight))]
        for piece in cut:
            for index, matrix in self._matrices(weight, changes, piece):
                if not is_linear:
                    multiply(parts[index], matrix, biases[index], columns[index])
                else:
                    own = biases[index]
                    multiply(parts[index], matrix.T, None if own is None else own[piece], columns[index][:, piece])
        return output.view(*inputs.shape[:-1], output.shape[-1])

    def _lookup_of_each(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """``F.embedding`` with each group's own table; None for calls that do more."""
        if (found := table_of(args, kwargs)) is None:
            return None
        ids, table = found
        if id(table) not in self._ids or not self._has_rows(ids):
            return None
        rows = ids.reshape(-1)
        stored = table.detach().contiguous()
        output = stored.new_empty(len(rows), table.shape[1])
        count = len(self.groups)
        for change, own, out in zip(self._changes(table), rows.chunk(count), output.chunk(count), strict=True):
            if change is None:
                torch.index_select(stored, 0, own, out=out)
            else:
                change.add_to_rows(stored, own, out)
        return output.view(*ids.shape, output.shape[-1])

    def _broadcast(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The output of a sum or product with a parameter that all rows share, such as a norm's gain; None for others.

        The groups become a dimension, along which the parameter differs.
        """
        if kwargs or len(args) != 2 or not all(isinstance(arg, Tensor) for arg in args):
            return None
        is_first = id(args[0]) in self.held
        weight, inputs = args if is_first else args[::-1]
        # A tensor without dimensions would no longer leave the output's dtype to the other operand.
        if not self._has_rows(inputs) or not 0 < weight.ndim < inputs.ndim:
            return None
        weights = torch.stack(self._vectors(weight))
        weights = weights.view(len(weights), *[1] * (inputs.ndim - weight.ndim), *weight.shape)
        parts = inputs.unflatten(0, (len(weights), -1))
        return func(*((weights, parts) if is_first else (parts, weights))).flatten(0, 1)

    def _matrices(
        self, weight: nn.Parameter, changes: Sequence[Perturbation | None], piece: slice
    ) -> Iterator[tuple[int, Tensor]]:
        """The index of each group with its perturbed rows of a matrix, in memory that later groups reuse."""
        stored = weight.detach().contiguous()[piece]
        buffers = [self.scratch.take(weight.device) for _ in range(2)]
        for pair in _pairs(changes):
            outs = [buffer.tensor(stored.shape, stored.dtype, False) for buffer in buffers[: len(pair)]]
            yield from zip(pair, _perturbed(changes[pair[0]], stored, outs, piece.start), strict=True)
        self.scratch.give_back(buffers)

    def _vectors(self, value: Any) -> list[Any]:
        """A small parameter as each group sees it; `value` itself for each group if it is not perturbed."""
        if id(value) not in self._ids:
            return [value] * len(self.groups)
        stored, changes = value.detach().contiguous(), self._changes(value)
        found: dict[int, Tensor] = {}
        for pair in _pairs(changes):
            outs = [torch.empty_like(stored) for _ in pair]
            found |= zip(pair, _perturbed(changes[pair[0]], stored, outs), strict=True)
        return [found[index] for index in range(len(self.groups))]

    def _changes(self, parameter: nn.Parameter) -> list[Perturbation | None]:
        return [group.perturbations.get(parameter) for group in self.groups]


def _pairs(changes: Sequence[Perturbation | None]) -> list[tuple[int, ...]]:
    """The indices of perturbations, paired where one is the negation of another, otherwise alone."""
    left, found = dict(enumerate(changes)), []
    while left:
        place = min(left)
        change = left.pop(place)
        opposite = (i for i, other in left.items() if isinstance(change, Direction) and change.is_opposite(other))
        pair = (place, *islice(opposite, 1))
        left.pop(pair[-1], None)
        found.append(pair)
    return found


def _perturbed(
    change: Perturbation | None, stored: Tensor, outs: Sequence[Tensor], first_row: int = 0
) -> Sequence[Tensor]:
    """Writes perturbed rows of a parameter to `outs`; to the second one, if any, with the negated direction."""
    if change is None:
        return [stored]
    start = first_row * stored[0].numel() if first_row else 0
    if len(outs) == 2 and isinstance(change, Direction):
        change.add_both(stored, outs[0], outs[1], start)
    elif isinstance(change, ByRows):
        change.add_to(stored, outs[0], start)
    else:
        change.add_to(stored, outs[0])
    return outs


def _refuse_transforms() -> None:
    if is_transformed():
        raise CannotStack("torch.func (grad, jvp, vmap) transforms the network")


def perturbed_by(contexts: Sequence[Perturbed]) -> dict[nn.Parameter, Perturbation]:
    """The parameters that some of these contexts perturb, each with one of its perturbations."""
    return {p: w for context in contexts for p, w in context.perturbations.items() if w is not None}


@contextmanager
def watched_everywhere(contexts: Sequence[Perturbed]) -> Iterator[None]:
    """Makes contexts watch all functions for a while.

    While another function runs in place of the network, so few functions are called that this costs less than replacing
    the forwards of hundreds of modules.
    """
    for context in contexts:
        context.is_everywhere = True
    try:
        yield
    finally:
        for context in contexts:
            context.is_everywhere = False


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a function is called with; containers are searched only if there are any, which takes longer."""
    values = [*args, *kwargs.values()]
    if any(isinstance(value, list | tuple | dict) for value in values):
        return tensors_in(values)
    return [value for value in values if isinstance(value, Tensor)]


def _joined(outputs: list[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, list | tuple):
        return type(first)(_joined(list(members)) for members in zip(*outputs, strict=True))
    if first is None:
        return None
    raise CannotStack(f"a function returns {type(first).__name__} for a parameter")
