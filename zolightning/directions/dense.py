"""A direction of one parameter: regenerated wherever it is added, never stored."""

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from zolightning.directions import native
from zolightning.directions.kernels import chunks, kernel
from zolightning.directions.noise import Key, NoiseKind, coefficient, counter, key, noise_sum, start_of


def _perturb(out: Tensor, weight: Tensor, keys: Tensor, coefficients: Tensor, start: Tensor, kind: NoiseKind) -> None:
    noise = noise_sum(counter(weight, start), keys, coefficients, kind)
    out.copy_((weight.to(noise.dtype) + noise).to(out.dtype))


def _perturb_rows(
    out: Tensor, table: Tensor, rows: Tensor, keys: Tensor, coefficients: Tensor, kind: NoiseKind
) -> None:
    columns = table.shape[1]
    index = rows.to(torch.int32)[:, None] * columns + torch.arange(columns, dtype=torch.int32, device=rows.device)
    noise = noise_sum(index, keys, coefficients, kind)
    out.copy_((F.embedding(rows, table).to(noise.dtype) + noise).to(out.dtype))


def _accumulate(
    total: Tensor, keys: Tensor, coefficients: Tensor, start: Tensor, decay: Tensor, kind: NoiseKind
) -> None:
    total.copy_(decay * total + noise_sum(counter(total, start), keys, coefficients, kind).to(total.dtype))


class Direction:
    """A weighted sum of seeded dense directions of one parameter, never materialised.

    Args:
        keys: int32, shape (queries, 2).
        coefficients: shape (queries,), from :func:`coefficient`; float32, or float64 for double-precision
            parameters: the dtype of the arithmetic.
        kind: distribution of the noise.
    """

    def __init__(self, keys: Tensor, coefficients: Tensor, kind: NoiseKind) -> None:
        self.keys = keys
        self.coefficients = coefficients
        self.kind = kind

    def add_to(self, weight: Tensor, out: Tensor, start: int = 0) -> None:
        """Writes ``weight + direction`` to `out`; both contiguous, their first element has index `start`.

        The dtype of `out` may be narrower than that of `weight`.
        """
        flat_out, flat_weight = out.view(-1), weight.view(-1)
        if native.available(flat_weight, start) and native.available(flat_out):
            native.perturb(flat_out, flat_weight, self.keys, self.coefficients, self.kind, start)
            return
        run, size = kernel(_perturb, flat_weight)
        for part in chunks(flat_weight.numel(), size):
            first = start_of(start + part.start, weight.device)
            run(flat_out[part], flat_weight[part], self.keys, self.coefficients, first, self.kind)

    def add_to_rows(self, table: Tensor, rows: Tensor, out: Tensor) -> None:
        """Writes ``(table + direction)[rows]`` to `out`, reading and generating these rows only.

        Args:
            table: (m, n), contiguous.
            rows: integers, shape (k,).
            out: (k, n).
        """
        if native.available(out, start=table.shape[1]):
            native.perturb_rows(out, F.embedding(rows, table), rows, self.keys, self.coefficients, self.kind)
            return
        run, size = kernel(_perturb_rows, out)
        for part in chunks(rows.numel(), max(1, size // table.shape[1])):
            run(out[part], table, rows[part], self.keys, self.coefficients, self.kind)

    def accumulate(self, total: Tensor, decay: float = 1.0, start: int = 0) -> None:
        """``total = decay * total + direction``, in place and contiguous: a moment, or a plain sum."""
        flat = total.view(-1)
        if native.available(flat, start):
            native.add(flat, self.keys, self.coefficients, self.kind, decay, start=start)
            return
        factor = torch.tensor(decay, dtype=flat.dtype, device=flat.device)
        run, size = kernel(_accumulate, flat)
        for part in chunks(flat.numel(), size):
            first = start_of(start + part.start, flat.device)
            run(flat[part], self.keys, self.coefficients, first, factor, self.kind)


def directions(
    parameters: Mapping[str, Tensor],
    seed: int,
    step: int,
    coefficients: Mapping[int, float],
    kind: NoiseKind,
) -> dict[str, Direction]:
    """One direction for each named parameter, the same combination of queries for all.

    Args:
        parameters: names, which select the noise, and tensors, which say where and how wide to compute it.
        seed: the run's seed.
        step: number of the step.
        coefficients: the multiple of unit-variance noise of each query that takes part.
        kind: distribution of the noise.
    """
    names, queries = tuple(parameters), tuple(coefficients)
    rounded = [coefficient(value, kind) for value in coefficients.values()]

    @functools.cache
    def keys_on(device: torch.device) -> tuple[Tensor, ...]:
        return _keys(names, seed, step, queries, device)

    @functools.cache
    def coefficients_on(device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.tensor(rounded, dtype=dtype, device=device)

    return {
        name: Direction(
            keys_on(tensor.device)[i],
            coefficients_on(tensor.device, arithmetic(tensor.dtype)),
            kind,
        )
        for i, (name, tensor) in enumerate(parameters.items())
    }


# What one step asks for again and again: both signs of a query, and the update. Old steps drop out.
@functools.lru_cache(maxsize=64)
def _keys(
    names: tuple[str, ...], seed: int, step: int, queries: tuple[int, ...], device: torch.device
) -> tuple[Tensor, ...]:
    """The keys of each name, int32, shape (queries, 2)."""
    return torch.stack([_keys_of_query(names, seed, step, query) for query in queries], dim=1).to(device).unbind()


@functools.lru_cache(maxsize=1024)
def _keys_of_query(names: tuple[str, ...], seed: int, step: int, query: int) -> Tensor:
    """The keys of all names, int32, shape (names, 2)."""
    return torch.tensor([key(seed, step, query, name) for name in names], dtype=torch.int32)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which perturbations and updates of a weight are computed: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def standard(shape: Sequence[int], key: Key, kind: NoiseKind = "gaussian", device: str = "cpu") -> Tensor:
    """One materialised direction of unit variance, fp32: for inspection, tests and small factors."""
    total = torch.zeros(tuple(shape), dtype=torch.float32, device=device)
    keys = torch.tensor([key], dtype=torch.int32, device=device)
    coefficients = torch.tensor([coefficient(1.0, kind)], dtype=torch.float32, device=device)
    Direction(keys, coefficients, kind).accumulate(total)
    return total
