"""Dense random directions, which are regenerated wherever they are added and never stored."""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zolightning import kernels
from zolightning.directions.shards import first_element
from zolightning.kernels.noise import CODE_SCALE, Noise, NoiseKind, coefficient, keys_of, on_device


@dataclass(eq=False)
class Direction(Noise):
    """The noise of one parameter as a direction to move in: it is generated wherever it is added, and never stored.

    Args:
        keys, coefficients, kind: see :class:`~zolightning.kernels.noise.Noise`.
        values: the coefficients as Python numbers, if they are known on the host.
        first: index, in the whole parameter, of the first element that it is added to; not 0 for a rank's rows (FSDP2).
    """

    values: tuple[float, ...] | None = None
    first: int = 0

    def of_rows(self, first: int) -> "Direction":
        """The part of this direction from element `first` on."""
        return Direction(self.keys, self.coefficients, self.kind, self.values, first) if first else self

    def times(self, factor: float) -> "Direction":
        """This direction times `factor`; its coefficients must be known on the host."""
        assert self.values is not None
        values = tuple(coefficient(value * factor / CODE_SCALE[self.kind], self.kind) for value in self.values)
        coefficients = coefficient_tensor(values, self.coefficients.dtype, self.coefficients.device)
        return Direction(self.keys, coefficients, self.kind, values, self.first)

    def opposite(self, negated: "Negated") -> "Direction":
        """This direction negated; `negated` makes its coefficients, once for all directions that share them."""
        coefficients, values = negated(self)
        if type(self) is Direction:
            return Direction(self.keys, coefficients, self.kind, values, self.first)
        made = copy.copy(self)
        made.coefficients, made.values = coefficients, values
        return made

    def is_opposite(self, other: object) -> bool:
        """Whether `other` is this direction with negated coefficients; False if only the device knows them."""
        return (
            isinstance(other, Direction)
            and type(self) is type(other)
            and self.keys is other.keys
            and self.kind == other.kind
            and self.values is not None
            and other.values is not None
            and all(one == -two for one, two in zip(self.values, other.values, strict=True))
        )

    def add_to(self, weight: Tensor, out: Tensor, start: int = 0) -> None:
        """Writes ``weight + direction`` to `out`; both are contiguous, and their first element has index `start`.

        The dtype of `out` may be narrower than that of `weight`.
        """
        kernels.perturb(out, weight, self, self.first + start)

    def add_both(self, weight: Tensor, plus: Tensor, minus: Tensor, start: int = 0) -> None:
        """Writes ``weight + direction`` to `plus` and ``weight - direction`` to `minus`, reading the weight once.

        The same bits as :meth:`add_to` of this direction and of the one with negated coefficients.
        """
        kernels.perturb_both(plus, minus, weight, self, self.first + start)

    def add_to_rows(self, table: Tensor, rows: Tensor, out: Tensor) -> None:
        """Writes ``(table + direction)[rows]`` to `out`, reading and generating only these rows.

        Args:
            table: (m, n), contiguous.
            rows: integers, shape (k,).
            out: (k, n).
        """
        kernels.perturb_rows(out, table, rows, self)

    def unit_noise(self, weight: Tensor, start: int = 0) -> Tensor:
        """The unit-variance noise of this direction, which must be that of a single query.

        Args:
            weight: some stored elements, (n,).
            start: index of the first of them in the parameter.

        Returns:
            (n,), float32.
        """
        noise = torch.zeros(weight.numel(), dtype=torch.float32, device=weight.device)
        one = coefficient_tensor((coefficient(1.0, self.kind),), torch.float32, weight.device)
        kernels.add(noise, Noise(self.keys, one, self.kind), start=self.first + start)
        return noise

    def of_elements(self, weight: Tensor, start: int = 0) -> Tensor:
        """This direction as a tensor, for methods that do more than add it: an estimated gradient, for one.

        Args:
            weight: some stored elements, (n,).
            start: index of the first of them in the tensor that the direction belongs to.

        Returns:
            (n,), float32, or float64 for double-precision weights. An element that does not move is -0.0.
        """
        found = torch.zeros(weight.numel(), dtype=compute_dtype(weight.dtype), device=weight.device)
        self.accumulate(found, start=start)
        return found

    def arguments(self) -> dict[str, Any]:
        """The arguments with which the loops of :mod:`zolightning.kernels` add this direction."""
        return {"noise": self, "start": self.first}

    def accumulate(self, total: Tensor, decay: float = 1.0, start: int = 0) -> None:
        """``total = decay * total + direction``, in place and contiguous: a moment, or a plain sum."""
        kernels.add(total.view(-1), self, decay, start=self.first + start)


class DerivedDirection(Direction):
    """Abstract: a direction that is changed wherever it is added; a subclass overrides what adds it.

    Args:
        direction: the direction of a whole parameter.
    """

    def __init__(self, direction: Direction) -> None:
        super().__init__(direction.keys, direction.coefficients, direction.kind, direction.values)

    def arguments(self) -> dict[str, Any]:
        """There are none, unless a subclass has some: loops would add the direction that it is derived from.

        Raises:
            TypeError: always.
        """
        name = type(self).__name__
        raise TypeError(f"{name} cannot be an argument of a loop: add its `of_elements` with `add_tensor`.")


class Coefficients(NamedTuple):
    """What the directions of a sum are multiplied by: a tensor, and its numbers if they are known on the host."""

    table: Tensor
    values: tuple[float, ...] | None


Negated = Callable[[Direction], Coefficients]


def negated(direction: Direction) -> Coefficients:
    """The coefficients of a direction with the other sign."""
    own, values = direction.coefficients, direction.values
    if values is None:
        return Coefficients(-own, None)
    values = tuple([-value for value in values])
    return Coefficients(coefficient_tensor(values, own.dtype, own.device), values)


def of_own_rows(directions: Iterable[Direction], parameters: Iterable[Tensor]) -> list[Direction]:
    """The part of each direction that belongs to the rows of its parameter that this rank holds."""
    pairs = zip(directions, parameters, strict=True)
    return [d if type(p) is nn.Parameter else d.of_rows(first_element(p)) for d, p in pairs]  # few are inspected


def accumulate_each(directions: Sequence[Direction], totals: Sequence[Tensor], decay: float = 1.0) -> None:
    """:meth:`Direction.accumulate` of several directions, each to its own total, in few launches on a GPU."""
    pairs = zip(directions, totals, strict=True)
    each = [{**direction.arguments(), "weight": total.view(-1), "decay": decay} for direction, total in pairs]
    kernels.for_each(kernels.add, each)


def directions(
    parameters: Mapping[str, Tensor],
    seed: int,
    step: int,
    coefficients: Mapping[int, float],
    kind: NoiseKind,
) -> dict[str, Direction]:
    """One direction for each named parameter, the same combination of queries for all.

    Args:
        parameters: parameters by name. Names select the noise, and tensors the device and the dtype of its arithmetic.
        seed: the run's seed.
        step: number of the step.
        coefficients: the factor of each query's unit-variance noise.
        kind: distribution of the noise.
    """
    names, queries = tuple(parameters), tuple(coefficients)
    rounded = tuple(coefficient(value, kind) for value in coefficients.values())
    shared: dict[tuple[torch.device, torch.dtype], tuple[tuple[Tensor, ...], Tensor]] = {}  # keys, coefficients
    found = {}
    for index, (name, tensor) in enumerate(parameters.items()):
        device, dtype = place = tensor.device, tensor.dtype
        if place not in shared:
            keys = _keys(names, seed, step, queries, device)
            shared[place] = keys, coefficient_tensor(rounded, compute_dtype(dtype), device)
        keys, values = shared[place]
        found[name] = Direction(keys[index], values, kind, rounded)
    return found


# Cached because both signs of a query and the update of a step need the same keys.
@functools.lru_cache(maxsize=64)
def _keys(
    names: tuple[str, ...], seed: int, step: int, queries: tuple[int, ...], device: torch.device
) -> tuple[Tensor, ...]:
    """The keys of each name, int32, shape (queries, 2)."""
    table = torch.stack([_keys_of_query(names, seed, step, query) for query in queries], dim=1)
    return on_device(table, device).unbind()


# Cached because the evaluations of all steps need the same coefficients.
@functools.lru_cache(maxsize=64)
def coefficient_tensor(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Coefficients as a tensor, (queries,), which is cached: do not write to it."""
    return on_device(torch.tensor(values, dtype=dtype), device)


@functools.lru_cache(maxsize=1024)
def _keys_of_query(names: tuple[str, ...], seed: int, step: int, query: int) -> Tensor:
    """The keys of all names, int32, shape (names, 2)."""
    return torch.tensor(keys_of(names, seed, step, query), dtype=torch.int32)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which perturbations and updates of a weight are computed: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)
