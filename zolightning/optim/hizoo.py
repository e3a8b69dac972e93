"""HiZOO: zeroth-order descent scaled by an estimated diagonal curvature."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

import torch
from torch import nn

from zolightning.checks import require_choice, require_fraction
from zolightning.directions.perturbation import Perturbation
from zolightning.optim.common import CommonAndQueries, Unpack
from zolightning.optim.curvature import (
    CurvatureEstimate,
    Structure,
    has_curvature,
    relative_change,
    sample,
    scaled,
    update_,
)
from zolightning.optim.dense import DenseOptimizer
from zolightning.optim.estimators import ThreePoint
from zolightning.optim.moments import descend
from zolightning.optim.record import StepRecord

_QUANTILES = (0.01, 0.5, 0.99)  # of the curvature, to be logged


class HiZOO(DenseOptimizer):
    """HiZOO (Zhao et al., arXiv 2402.15173, ICLR 2025, algorithm 1), and with ``curvature="row_column"`` HiZOO-L.

    Each step evaluates one batch at ``W``, ``W + eps u / sqrt(H)`` and ``W - eps u / sqrt(H)``, where H is a curvature
    kept for each weight. Then H is updated from the second difference of the losses
    (:mod:`zolightning.optim.curvature` says how), and the weights move by ``-lr * g * u / sqrt(H)``, where the
    projected gradient g is that of the old H and the root that of the new one: on average by ``-lr * gradient / H``.
    Several queries share the loss at W.

    Differs from the released code: H is float32 whatever the weights are, whereas float16 loses all of a change with
    the recommended smoothing; there is no fourth forward to log a loss; H stays within bounds; and weight decay depends
    on the shape (matrices only). HiZOO-L is our reconstruction.

    Where parameters move in blocks (:mod:`zolightning.optim.blocks`), those in no block move as in MeZO, without a
    curvature, as FOCUS and B-PDF do for the embeddings and the head.

    It has no counterpart in a subspace: the diagonal of a Hessian in the coordinates of one basis says nothing about
    those of the next. To keep fewer numbers, train adapters (``configs/scopes/lora.yaml``) or blocks.

    Second differences are divided by ``eps**2``, which amplifies the rounding errors of half-precision losses as much.
    If the curvature reaches its upper bound, use a larger `eps` or a smaller `smoothing`.

    Memory besides that of :class:`~zolightning.optim.MeZO`: 4 bytes per weight for a full curvature, next to nothing
    for the others.

    Args:
        params: parameters or parameter groups.
        lr: step size; the weights move by ``lr * projected_grad / sqrt(H)`` along a unit-variance direction.
        eps: perturbation scale: standard deviation of the perturbation of a weight whose curvature is 1.
        smoothing: weight of each new estimate in the curvature, at least 0 and below 1; 0 is MeZO at the cost of three
            forwards. Or a mapping from steps, 0 among them, to the values that hold from those steps on:
            ``{0: 1e-6, 9800: 1e-8}``.
        curvature: "full", one for every weight; "row_column", one for every row and every column of a matrix; or
            "scalar", one for each parameter.
        curvature_estimate: "code", as in the released code and the paper's algorithm, or "centered", whose mean is the
            diagonal of the Hessian.
        curvature_bounds: the smallest and the largest curvature allowed. Weights are perturbed by at most
            ``eps / sqrt(smallest)``.
        weight_decay: decoupled: ``W -= lr * weight_decay * W`` for parameters of two dimensions or more.
        estimator: ``ThreePoint()``; no other is accepted.
        **common: num_queries, align_queries, noise, seed, update_precision: see
            :class:`~zolightning.optim.base.ZerothOrderOptimizer`.
    """

    takes_shards = True
    estimator: ThreePoint

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        eps: float = 1e-3,
        smoothing: float | dict[int, float] = 1e-6,
        curvature: Structure = "full",
        curvature_estimate: CurvatureEstimate = "code",
        curvature_bounds: tuple[float, float] = (1e-4, 1e4),
        weight_decay: float = 0.0,
        estimator: ThreePoint | None = None,
        **common: Unpack[CommonAndQueries],
    ) -> None:
        require_choice("curvature", curvature, get_args(Structure))
        require_choice("curvature_estimate", curvature_estimate, get_args(CurvatureEstimate))
        estimator = ThreePoint() if estimator is None else estimator
        if not isinstance(estimator, ThreePoint):
            found = type(estimator).__name__
            raise ValueError(f"`estimator` must be ThreePoint(), from which HiZOO gets the curvature, got {found}().")
        if curvature_estimate == "centered" and (curvature == "scalar" or common.get("noise") == "rademacher"):
            what = "`curvature` 'scalar'" if curvature == "scalar" else "`noise` 'rademacher'"
            raise ValueError(
                f"`curvature_estimate` must be 'code' with {what}, with which 'centered' measures nothing."
            )
        self.curvature: Structure = curvature
        self.curvature_estimate: CurvatureEstimate = curvature_estimate
        descent = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        curving = {"smoothing": _schedule(smoothing), "curvature_bounds": curvature_bounds}
        super().__init__(params, descent | curving, estimator=estimator, **common)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        group["smoothing"] = _schedule(group["smoothing"])
        floor, ceiling = group["curvature_bounds"]
        if not 0 < floor <= 1 <= ceiling < float("inf"):
            raise ValueError(
                "`curvature_bounds` must be two numbers, one above 0 and at most 1, one finite and at least 1, got "
                f"{group['curvature_bounds']!r}."
            )

    def perturbations(self, query: int, sign: int) -> dict[nn.Parameter, Perturbation]:
        found: dict[nn.Parameter, Perturbation] = {}
        for group in self.param_groups:
            directions = self.directions(group, group["seed"], group["step"], {query: sign * group["eps"]})
            for parameter, direction in directions.items():
                # Not through the dictionary's default: an estimate creates no state.
                state = self.state.get(parameter, {})
                found[parameter] = scaled(direction, state, group["curvature_bounds"], parameter)
        return found

    def update(self, record: StepRecord) -> None:
        differences = self.estimator.second_differences(record.losses)
        for group, lr in zip(self.param_groups, record.lr, strict=True):
            smoothing, bounds = _at(group["smoothing"], record.step), group["curvature_bounds"]
            change = relative_change(self.curvature_estimate, smoothing, differences, group["eps"], self.noise, bounds)
            coefficients = {query: -lr * g / self.num_queries for query, g in enumerate(record.projected_grads)}
            found = self.directions(group, record.seed, record.step, coefficients)
            decay = 1 - lr * group["weight_decay"]
            beside = {parameter: move for parameter, move in found.items() if self.blocks.is_beside(parameter)}
            curved = {p: move for p, move in found.items() if p not in beside} if beside else found
            with self.to_move(beside, beside.values()) as (weights, states, moves):
                descend(weights, states, moves, group, lr, self.update_precision)
            with self.to_move(curved, curved.values()) as (weights, states, moves):
                update_(weights, states, moves, change, self.curvature, self.update_precision, decay)

    def needs_whole(self) -> Iterator[tuple[str, object, str]]:
        yield from super().needs_whole()
        if self.curvature == "row_column":
            yield "curvature", self.curvature, "'full' or 'scalar'"

    def measurements(self) -> dict[str, float]:
        """Quantiles of the curvature over all weights, estimated from a sample of each parameter."""
        samples: list[torch.Tensor] = []
        counts: list[torch.Tensor] = []  # how many elements each sampled one stands for
        for _, _, parameter in self.trainable():
            # Under zo_fsdp a rank may have no rows of a small parameter
            if has_curvature(state := self.state.get(parameter, {})) and len(found := sample(state)):
                samples.append(found)
                counts.append(torch.full_like(found, math.prod(self.trainable_shape(parameter)) / len(found)))
        if not samples:
            return {}
        values, order = torch.cat(samples).sort()
        up_to = torch.cat(counts)[order].cumsum(0)
        quantiles = values[torch.searchsorted(up_to, up_to[-1] * up_to.new_tensor(_QUANTILES))].tolist()
        return {f"curvature_{q:g}": value for q, value in zip(_QUANTILES, quantiles, strict=True)}


def _schedule(smoothing: Any) -> float | tuple[tuple[int, float], ...]:
    """A smoothing as it is stored: a number, or steps and values in order; a ValueError says what is out of range."""
    if not isinstance(smoothing, Mapping | tuple):
        require_fraction("smoothing", smoothing)
        return smoothing
    schedule = tuple(sorted((int(step), value) for step, value in dict(smoothing).items()))  # YAML may quote keys
    if not schedule or schedule[0][0] != 0:
        raise ValueError(
            f"`smoothing` must have a value for step 0, such as {{0: 1e-6, 1000: 1e-8}}, got {smoothing!r}."
        )
    for _, value in schedule:
        require_fraction("smoothing", value)
    return schedule


def _at(smoothing: float | tuple[tuple[int, float], ...], step: int) -> float:
    if isinstance(smoothing, tuple):
        return next(value for start, value in reversed(smoothing) if start <= step)
    return smoothing
