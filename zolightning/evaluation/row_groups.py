"""A context in which the rows of a batch come in groups, and each group sees perturbations of its own.

What a function reads decides how it is run: once for all groups, where a low-rank product or a gain lets itself be
computed so, and once for each group's rows otherwise.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from zolightning.directions.low_rank import LowRank, stacked_product
from zolightning.directions.perturbation import Perturbation
from zolightning.evaluation.perturbed import PRODUCTS, Perturbed, factors_of
from zolightning.evaluation.scratch import Buffer

_ELEMENTWISE = frozenset({Tensor.mul, Tensor.add, torch.mul, torch.add})


class CannotStack(Exception):
    """Why the evaluations of a step cannot be stacked."""


class RowGroups(Perturbed):
    """A context in which the rows of a batch come in groups, and each group sees parameters perturbed in its own way.

    Args:
        groups: what each group would see; none of them perturbs in place.
        rows: of all groups together. Tensors whose first dimension is a multiple of it are cut.
        held: tensors of the network, which are not cut whatever their shape, and their names; by id.
    """

    def __init__(self, groups: Sequence[Perturbed], rows: int, held: Mapping[int, str]) -> None:
        super().__init__(perturbed_by(groups), scratch=groups[0].scratch, readers=groups[0].readers)
        self.groups = groups
        self.rows = rows
        self.held = held
        self.cuts: list[tuple[Any, ...]] = []  # which parameter was read, and which arguments beside it were cut

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch._C.DisableTorchFunction():  # the contexts around this one have nothing to do with it
            return self._run(func, args, kwargs)

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = _arguments(args, kwargs)
        cut = [self._has_rows(tensor) for tensor in tensors]
        held = [id(tensor) for tensor in tensors if id(tensor) in self.held]
        self.cuts.append((func, *held, *cut))
        if func in PRODUCTS and (output := self._stacked_product(func, args, kwargs)) is not None:
            return output
        if func in _ELEMENTWISE and (output := self._broadcast(func, args, kwargs)) is not None:
            return output
        count = len(self.groups)
        outputs = []
        for index, group in enumerate(self.groups):

            def part(tensor: Tensor, index: int = index) -> Tensor:
                return tensor.chunk(count)[index] if self._has_rows(tensor) else tensor

            own_args, own_kwargs = apply_to_collection((args, kwargs), Tensor, part)
            outputs.append(group.run(func, own_args, own_kwargs))
        if not any(cut):
            outputs = [self._spread(output, index, tensors) for index, output in enumerate(outputs)]
        return _joined(outputs)

    def _has_rows(self, tensor: Tensor) -> bool:
        return bool(tensor.ndim) and len(tensor) % self.rows == 0 and id(tensor) not in self.held

    def _spread(self, output: Any, index: int, tensors: list[Tensor]) -> Tensor:
        """A group's rows of an output that was made without rows: position embeddings, a class token."""
        group_rows = self.rows // len(self.groups)
        if isinstance(output, Tensor) and output.ndim > 1 and len(output) in (1, self.rows):
            return output.expand(self.rows, *output.shape[1:])[:group_rows]
        names = ", ".join(f"`{self.held[id(tensor)]}`" for tensor in tensors if id(tensor) in self.held)
        raise CannotStack(f"the network reads {names} without the rows of a batch")

    def _stacked_product(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """The output of low-rank perturbations in one basis; None for all other products."""
        weight, inputs, bias = factors_of(func, args)
        found = [p for group in self.groups if isinstance(p := group.perturbations.get(weight), LowRank)]
        if kwargs or len(found) < len(self.groups) or not self._has_rows(inputs):
            return None
        taken: list[Buffer] = []
        biases = [group.exchange(bias, taken) for group in self.groups]
        output = stacked_product(found, func, inputs, weight.detach(), biases)
        self.scratch.give_back(taken)
        return output

    def _broadcast(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The output for a parameter that all rows share, a norm's gain: groups are then a dimension of its own."""
        if kwargs or len(args) != 2 or not all(isinstance(arg, Tensor) for arg in args):
            return None
        is_first = id(args[0]) in self.held
        weight, inputs = args if is_first else args[::-1]
        # A tensor without dimensions would no longer leave the output's dtype to the other one.
        if not self._has_rows(inputs) or not 0 < weight.ndim < inputs.ndim:
            return None
        taken: list[Buffer] = []
        weights = torch.stack([group.exchange(weight, taken) for group in self.groups])
        self.scratch.give_back(taken)
        weights = weights.view(len(weights), *[1] * (inputs.ndim - weight.ndim), *weight.shape)
        parts = inputs.unflatten(0, (len(weights), -1))
        return func(*((weights, parts) if is_first else (parts, weights))).flatten(0, 1)


def perturbed_by(contexts: Sequence[Perturbed]) -> dict[nn.Parameter, Perturbation]:
    return {p: w for context in contexts for p, w in context.perturbations.items() if w is not None}


def tensors_in(data: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    apply_to_collection(data, Tensor, keep)
    return found


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a function is called with: seldom in containers, which take long to search."""
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
