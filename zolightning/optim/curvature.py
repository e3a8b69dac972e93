"""A diagonal curvature for each parameter, kept in its state, and how it scales directions and updates.

Where H is the curvature and u a direction of unit variance, the loss is probed along ``u / sqrt(H)``. A second
difference D of losses at distance eps says how H changes, with smoothing a (Zhao et al., "Second-Order Fine-Tuning
without Pain for LLMs: a Hessian Informed Zeroth-Order Optimizer", arXiv 2402.15173, algorithm 1):

=============  ==============================================
estimate       H becomes
=============  ==============================================
``code``       ``(1 - a) H + a |D| / (2 eps**2) H u**2``
``centered``   ``(1 - a) H + a D / (2 eps**2) H (u**2 - 1)``
=============  ==============================================

For a quadratic with Hessian Q, ``D / eps**2`` is ``u' H^-1/2 Q H^-1/2 u``, and the second form estimates its diagonal:
the mean of the term that a multiplies is ``Q_ii``. (This holds for a normal u. Ours has a fourth moment of 2.875
instead of 3, so the form is multiplied by 2 / 1.875, which gives it the same mean.) The first one, that of the released
code and of algorithm 1, leaves out the ``- 1`` and takes the absolute value: its mean is
``Q_ii + H_ii trace(H^-1 Q) / 2``, in which the trace far outweighs ``Q_ii`` if there are many parameters. H is
then one number for all, times noise.

Several queries are averaged. H starts at 1 and stays within bounds. Three structures:

* ``full``: a number for every element, float32: 4 bytes per weight, 8 in double precision. ``curvature`` in the state.
* ``row_column``: for a matrix (m, n) a number for every row and every column, ``curvature_rows`` and
  ``curvature_columns``, whose products are H; its means over columns and rows are kept, as in Adafactor (Shazeer and
  Stern, arXiv 1804.04235), and the weights move by the products of the new ones. Dimensions after the first are
  flattened into one. This is what we take HiZOO-L to be; no detailed description of it is public.
  Other parameters have a full one.
* ``scalar``: one number for each parameter, to which ``u**2`` contributes its mean, 1.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from zolightning import kernels
from zolightning.directions.dense import Direction, coefficient_tensor, compute_dtype
from zolightning.directions.scaled import FactoredCurvature, FullCurvature, ScaledDirection
from zolightning.kernels.curvature import Change
from zolightning.kernels.noise import CODE_SCALE, NoiseKind
from zolightning.optim.precision import State, UpdatePrecision, stored, stored_each
from zolightning.optim.samples import strided

Structure = Literal["full", "row_column", "scalar"]
CurvatureEstimate = Literal["code", "centered"]
_LARGEST = 1e30  # relative change of a curvature: far beyond any bounds, and without overflow
# The mean of u**4 (3 for a normal distribution), by which a centered estimate is made unbiased.
_FOURTH_MOMENT: dict[NoiseKind, float] = {"gaussian": 2.875, "rademacher": 1.0}


class RelativeChange(NamedTuple):
    """How a step changes curvatures: ``H += H * (shift + sum over queries of ratio * u**2)``, within bounds.

    Attributes:
        shift: the relative change that all elements share.
        ratios: one for each query.
        bounds: the least and the largest curvature.
    """

    shift: float
    ratios: tuple[float, ...]
    bounds: tuple[float, float]

    def of_codes(self, kind: NoiseKind, dtype: torch.dtype, device: torch.device) -> Change:
        """The same change in terms of the integer codes of the noise, for the kernels and a weight of this dtype."""
        squares = tuple(ratio * CODE_SCALE[kind] ** 2 for ratio in self.ratios)
        return Change(self.shift, coefficient_tensor(squares, compute_dtype(dtype), device), *self.bounds)


def relative_change(
    estimate: CurvatureEstimate,
    smoothing: float,
    second_differences: Sequence[float],
    eps: float,
    kind: NoiseKind,
    bounds: tuple[float, float],
) -> RelativeChange:
    """The change of curvatures that follows from the second differences of a step's queries; see the module docstring.

    All of it is computed in double precision: the released code multiplies by `smoothing` first, in the weights' dtype,
    which in float16 leaves nothing of the change.
    """
    ratios = [smoothing * (difference / (2 * eps**2)) / len(second_differences) for difference in second_differences]
    if estimate == "code":
        ratios = [abs(ratio) for ratio in ratios]
        shift = -smoothing
    else:
        ratios = [ratio * 2 / (_FOURTH_MOMENT[kind] - 1) for ratio in ratios]
        shift = -smoothing - sum(ratios)
    return RelativeChange(_limited(shift), tuple(map(_limited, ratios)), bounds)


def scaled(
    direction: Direction, state: State, bounds: tuple[float, float], parameter: Tensor | None = None
) -> Direction:
    """``direction / sqrt(H)``; the direction itself where the state has no curvature yet.

    Args:
        direction: the direction of a whole parameter.
        state: the parameter's entry in the optimizer's state.
        bounds: the least and the largest curvature.
        parameter: the parameter, given if it may be sharded over ranks, each with the curvature of its own rows.
    """
    if "curvature_rows" in state:
        factored = FactoredCurvature(state["curvature_rows"], state["curvature_columns"], *bounds)
        return ScaledDirection(direction, factored)
    curvature = state.get("curvature", 1.0)
    if isinstance(curvature, Tensor):
        return ScaledDirection(direction, FullCurvature(curvature, parameter))
    return direction if curvature == 1.0 else direction.times(1 / math.sqrt(curvature))


def update_(
    weights: Sequence[Tensor],
    states: Sequence[State],
    directions: Sequence[Direction],
    change: RelativeChange,
    structure: Structure,
    precision: UpdatePrecision,
    decay: float,
) -> None:
    """Changes the curvatures in `states`, made there if needed, and then adds ``direction / sqrt(H)`` to each weight.

    It takes few launches on a GPU, except for matrices of ``row_column``, whose curvature is computed for a few rows at
    a time.

    Args:
        weights, states, precision: see :func:`~zolightning.optim.moments.descend`.
        directions: the moves of the weights before they are divided by ``sqrt(H)``.
        change, structure: of the curvatures.
        decay: multiplies matrices first.
    """
    floor, ceiling = change.bounds
    of_place: dict[Any, Change] = {}
    plain: list[dict[str, Any]] = []
    curved: list[dict[str, Any]] = []
    calls = stored_each(weights, states, precision, decay)
    for call, weight, state, direction in zip(calls, weights, states, directions, strict=True):
        if structure == "scalar":
            before = state.get("curvature", 1.0)
            state["curvature"] = min(max(before + before * (change.shift + sum(change.ratios)), floor), ceiling)
            plain.append({**call, **scaled(direction, state, change.bounds).arguments()})
            continue
        place = direction.kind, weight.dtype, weight.device
        if place not in of_place:
            of_place[place] = change.of_codes(*place)
        if structure == "row_column" and weight.ndim >= 2:
            _update_factored_(weight, state, direction, of_place[place], precision, call["decay"])
            continue
        if "curvature" not in state:
            state["curvature"] = _ones(weight.numel(), weight)
        curved.append({**call, **direction.arguments(), "curvature": state["curvature"], "change": of_place[place]})
    kernels.for_each(kernels.add, plain)
    kernels.for_each(kernels.add_curved, curved)


def has_curvature(state: State) -> bool:
    """Whether there is a curvature in a parameter's state, where there may be extra bits of its weight alone."""
    return "curvature" in state or "curvature_rows" in state


def sample(state: State) -> Tensor:
    """Some elements of the curvature in a state that has one, float64, on the host."""
    if "curvature_rows" in state:
        some = [strided(state[name], 2**7) for name in ("curvature_rows", "curvature_columns")]
        return torch.outer(*some).flatten().double().cpu()
    return strided(torch.as_tensor(state["curvature"])).double().cpu()


def _update_factored_(
    weight: Tensor, state: State, direction: Direction, change: Change, precision: UpdatePrecision, decay: float
) -> None:
    """:func:`update_` of a matrix: changes a full curvature, and keeps its means over columns and over rows."""
    rows, columns = len(weight), weight[0].numel()
    if "curvature_rows" not in state:
        state["curvature_rows"], state["curvature_columns"] = _ones(rows, weight), _ones(columns, weight)
    curvature = FactoredCurvature(state["curvature_rows"], state["curvature_columns"], change.floor, change.ceiling)
    means, sums = torch.empty_like(curvature.rows), torch.zeros_like(curvature.columns, dtype=torch.float64)
    for part, own in curvature.parts(0, weight.numel()):
        kernels.curve(own, direction, change, part.start)
        matrix = own.view(-1, columns)
        means[part.start // columns : part.stop // columns] = matrix.mean(1)
        sums += matrix.sum(0)
    curvature.rows.copy_(means / means.mean())
    curvature.columns.copy_(sums / rows)
    unchanged = change._replace(shift=0.0, squares=torch.zeros_like(change.squares))
    for part, own in curvature.parts(0, weight.numel()):
        own_part = stored(weight, state, precision, part)
        kernels.add_curved(**own_part, curvature=own, noise=direction, change=unchanged, decay=decay, start=part.start)


def _ones(numel: int, like: Tensor) -> Tensor:
    return torch.ones(numel, dtype=compute_dtype(like.dtype), device=like.device)


def _limited(value: float) -> float:
    return min(max(value, -_LARGEST), _LARGEST)
