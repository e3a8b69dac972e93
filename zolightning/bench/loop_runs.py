"""Runs of the loops over parameters, on numbers with random bit patterns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from zolightning.bench.measure import CPU
from zolightning.kernels.adam import adam_step
from zolightning.kernels.curvature import Change
from zolightning.kernels.noise import Noise, NoiseKind, coefficient, key

DECAYS = (1.0, 1 - 1e-4)
_DECAYS_OF_EACH = (1.0, 1.0, 0.9, 0.9, 0.9, 1.0, 1.0, 0.9)  # of several weights
_ADAM = adam_step((0.9, 0.999), 3, 1e-8, -1e-3)

Shape = Literal["scaled", "masked"] | None
Outputs = Sequence[Tensor]


def noise(queries: int, kind: NoiseKind, device: torch.device, size: float = 1e-3, name: str = "w") -> Noise:
    """Noise whose coefficients alternate in sign, so that queries with equal codes cancel."""
    keys = [key(0, 1, query, name) for query in range(queries)]
    coefficients = [coefficient(size * (-1) ** query, kind) for query in range(queries)]
    return Noise(
        torch.tensor(keys, dtype=torch.int32, device=device),
        torch.tensor(coefficients, dtype=torch.float32, device=device),
        kind,
    )


def any_bits(numel: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers with random bit patterns: zeros of both signs, subnormal numbers, infinities and NaNs among them."""
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(integer)
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(limits.min, limits.max + 1, (numel,), generator=generator, dtype=torch.int64).to(integer)
    bits[::5] &= 2 ** (8 * dtype.itemsize - 10) - 1  # subnormal numbers and zeros
    values = bits.view(dtype)
    values[1::7], values[2::11], values[3::53] = -0.0, 0.0, float("nan")
    values[4::3] = torch.randn(values[4::3].shape, generator=generator).to(dtype) * 0.02
    return values


@dataclass(frozen=True)
class LoopRuns:
    """Each method runs the loop of its name, and returns the tensors that the loop has written.

    Their arguments: ``dtype`` of the weights, ``out`` dtype of the perturbed ones, ``extra_bits`` dtype of what
    completes weights to float32; the number of ``queries`` and the ``kind`` of their noise; the ``decay`` of weights;
    ``shape`` "scaled" for noise divided by the root of a curvature, "masked" for noise of small weights only.
    """

    loops: Any  # a backend, or :mod:`zolightning.kernels`, which chooses one
    device: torch.device  # device of the tensors
    numel: int  # number of elements of a tensor; some have fewer, or three times as many

    def perturb(
        self, dtype: torch.dtype, out: torch.dtype, queries: int, kind: NoiseKind, start: int, shape: Shape = None
    ) -> Outputs:
        weight = any_bits(self.numel, dtype).to(self.device)
        one, plus, minus = torch.empty(3, self.numel + 3, dtype=out, device=self.device)[:, : self.numel].unbind()
        drawn, shaped = noise(queries, kind, self.device), self._shaped(shape, self.numel)
        self.loops.perturb(one, weight, drawn, start, **shaped)
        if queries > 1:  # a backend has both signs of one query only
            return (one,)
        self.loops.perturb_both(plus, minus, weight, drawn, start, **shaped)
        return one, plus, minus

    def perturb_rows(self, dtype: torch.dtype, queries: int, kind: NoiseKind, shape: Shape = None) -> Outputs:
        count = self.numel // 70
        table = any_bits(count * 38, dtype).view(count, 38).to(self.device)
        rows = (torch.arange(5 * (count // 5) + 5) * 6 % count).to(self.device)  # not in order, and some twice
        out = torch.empty(len(rows), 38, dtype=dtype, device=self.device)
        self.loops.perturb_rows(
            out, table, rows, noise(queries, kind, self.device), **self._shaped(shape, len(rows), 38)
        )
        return (out,)

    def add(
        self,
        dtype: torch.dtype,
        extra_bits: torch.dtype | None,
        decay: float,
        queries: int,
        kind: NoiseKind,
        shape: Shape = None,
    ) -> Outputs:
        weight, low = self._stored(self.numel, dtype, extra_bits)
        self.loops.add(
            weight, noise(queries, kind, self.device), decay, low, start=2, **self._shaped(shape, self.numel)
        )
        return (weight,) if low is None else (weight, low)

    def add_curved(
        self, dtype: torch.dtype, extra_bits: torch.dtype | None, decay: float, queries: int, kind: NoiseKind
    ) -> Outputs:
        """Runs both loops that change a curvature; it grows, shrinks and reaches both of its bounds."""
        weight, low = self._stored(self.numel, dtype, extra_bits)
        alone, curvature = torch.linspace(1e-4, 3.7, 2 * self.numel).to(self.device).view(2, self.numel).unbind()
        squares = torch.tensor([1e-3 * (-1) ** query * 7**query for query in range(queries)], device=self.device)
        change, drawn = Change(-1e-3, squares, 0.01, 3.6), noise(queries, kind, self.device)
        self.loops.add_curved(weight, curvature, drawn, change, decay, low, start=2)
        self.loops.curve(alone, drawn, change, start=4)
        return (weight, alone, curvature) if low is None else (weight, alone, curvature, low)

    def add_adam(
        self, dtype: torch.dtype, extra_bits: torch.dtype | None, decay: float, queries: int, kind: NoiseKind
    ) -> Outputs:
        weight, low = self._stored(self.numel, dtype, extra_bits)
        mean, square = self._moments(self.numel)
        self.loops.add_adam(weight, mean, square, noise(queries, kind, self.device), _ADAM, decay, low, start=2)
        return (weight, mean, square) if low is None else (weight, mean, square, low)

    def add_delta(self, dtype: torch.dtype, extra_bits: torch.dtype | None, decay: float) -> Outputs:
        weight, low = self._stored(self.numel, dtype, extra_bits)
        self.loops.add_delta(weight, any_bits(self.numel, torch.float32, 2).to(self.device), decay, low, scale=-1.7e-3)
        return (weight,) if low is None else (weight, low)

    def perturb_each(
        self, dtype: torch.dtype, out: torch.dtype, queries: int, kind: NoiseKind, shape: Shape = None
    ) -> Outputs:
        """Perturbs tensors of several sizes in one call; every second weight is None, which stands for zeros."""
        weights = [any_bits(size + 60, dtype, size)[:size].to(self.device) for size in self._sizes()]
        outs = [torch.empty_like(weight, dtype=out) for weight in weights]
        given = [None if place % 2 else weight for place, weight in enumerate(weights)]
        shapes = [self._shaped(shape, size) for size in self._sizes()]
        each = zip(outs, given, self._noise_of_each(queries, kind), shapes, strict=True)
        self.loops.for_each(self.loops.perturb, [{"out": o, "weight": w, "noise": n} | s for o, w, n, s in each])
        return outs

    def add_to_each(
        self, dtype: torch.dtype, extra_bits: torch.dtype | None, queries: int, kind: NoiseKind, is_masked: bool = False
    ) -> Outputs:
        """Adds noise to tensors of several sizes in one call; if masked, each has a threshold of its own."""
        thresholds = [{"threshold": 0.02 / (1 + place)} if is_masked else {} for place in range(len(self._sizes()))]
        return self._for_each("add", dtype, extra_bits, queries, kind, thresholds)

    def add_curved_to_each(
        self, dtype: torch.dtype, extra_bits: torch.dtype | None, queries: int, kind: NoiseKind
    ) -> Outputs:
        change = Change(-1e-3, torch.tensor([1e-3 * 7**query for query in range(queries)]).to(self.device), 0.01, 3.6)
        curved = [self._shaped("scaled", size) | {"change": change} for size in self._sizes()]
        return self._for_each("add_curved", dtype, extra_bits, queries, kind, curved)

    def add_adam_to_each(
        self, dtype: torch.dtype, extra_bits: torch.dtype | None, queries: int, kind: NoiseKind
    ) -> Outputs:
        moments = [dict(zip(("mean", "square"), self._moments(size), strict=True)) for size in self._sizes()]
        return self._for_each(
            "add_adam", dtype, extra_bits, queries, kind, [both | {"step": _ADAM} for both in moments]
        )

    def add_delta_to_each(self, dtype: torch.dtype, extra_bits: torch.dtype | None) -> Outputs:
        deltas = [any_bits(size + 60, torch.float32, size)[:size].to(self.device) for size in self._sizes()]
        each = zip(deltas, self._stored_of_each(dtype, extra_bits), strict=True)
        calls = [{"delta": delta, "scale": -1.7e-3} | stored for delta, stored in each]
        self.loops.for_each(self.loops.add_delta, calls)
        return _tensors_in(calls)

    def _for_each(
        self,
        loop: str,
        dtype: torch.dtype,
        extra_bits: torch.dtype | None,
        queries: int,
        kind: NoiseKind,
        more: Sequence[dict[str, Any]],
    ) -> Outputs:
        """Runs a loop on tensors of several sizes in one call; every third begins later in its parameter."""
        each = enumerate(
            zip(self._stored_of_each(dtype, extra_bits), self._noise_of_each(queries, kind), more, strict=True)
        )
        calls = [{"noise": n, "start": place % 3 // 2 * 6} | stored | others for place, (stored, n, others) in each]
        self.loops.for_each(getattr(self.loops, loop), calls)
        return _tensors_in(calls)

    def _moments(self, numel: int) -> tuple[Tensor, Tensor]:
        """Adam's moments, of the size that gradients of about 1e-3 give; some are zeros."""
        mean = torch.linspace(-1e-3, 1e-3, numel).to(self.device)
        return mean, mean.square().flip(0)

    def _stored(self, numel: int, dtype: torch.dtype, extra_bits: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        """A weight and its extra bits; of a master copy every second element differs from the weight."""
        weight = any_bits(numel, dtype)
        if extra_bits is None:
            return weight.to(self.device), None
        if extra_bits.is_floating_point:
            low = weight.to(extra_bits)
            low[::2] += 1e-6
        else:
            limits = torch.iinfo(extra_bits)
            low = torch.randint(limits.min, limits.max + 1, (numel,), generator=torch.Generator().manual_seed(1)).to(
                extra_bits
            )
        return weight.to(self.device), low.to(self.device)

    def _stored_of_each(self, dtype: torch.dtype, extra_bits: torch.dtype | None) -> list[dict[str, Any]]:
        """For each size a weight, its extra bits and a decay; the memory of one weight is not aligned."""
        found = []
        for place, size in enumerate(self._sizes()):
            part = slice(int(place == 4), int(place == 4) + size)
            weight, low = self._stored(size + 60, dtype, extra_bits)
            own = None if low is None else low[part]
            found.append({"weight": weight[part], "extra_bits": own, "decay": _DECAYS_OF_EACH[place]})
        return found

    def _sizes(self) -> tuple[int, ...]:
        """Numbers of elements of several tensors: none, a few and many, multiples of 16 and others."""
        return 32, 0, 3 * self.numel // 16 * 16, 37, 16, self.numel, 2 * self.numel // 16 * 16, 48

    def _noise_of_each(self, queries: int, kind: NoiseKind) -> list[Noise]:
        """Noise for each size; keys are rows of one table, and coefficients are one tensor but for one size."""
        each = [noise(queries, kind, CPU, name=str(size)) for size in self._sizes()]
        table = torch.stack([one.keys for one in each]).to(self.device)
        coefficients = each[0].coefficients.to(self.device)
        found = [Noise(keys, coefficients, kind) for keys in table.unbind()]
        found[6] = -found[6]
        return found

    def _shaped(self, shape: Shape, *size: int) -> dict[str, Any]:
        """The argument that scales or masks noise; empty for plain noise. Some roots of the curvature are not exact."""
        if shape == "scaled":
            return {"curvature": torch.linspace(1e-4, 3.7, math.prod(size)).view(size).to(self.device)}
        return {} if shape is None else {"threshold": 0.019999999552965164}  # of the numbers' standard deviation


def _tensors_in(calls: Sequence[dict[str, Any]]) -> list[Tensor]:
    """All tensors among the arguments of some calls, those that they have written to included."""
    return [value for call in calls for value in call.values() if isinstance(value, Tensor)]
