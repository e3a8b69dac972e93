"""Measures how much of perturbations, updates and differences of the loss survives rounding."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor, nn

from zolightning.callbacks.replayed_walks import WeightsAndState
from zolightning.directions.low_rank import LowRank
from zolightning.directions.perturbation import Perturbation
from zolightning.evaluation.losses import LossFunction
from zolightning.optim import StepRecord, ZerothOrderOptimizer
from zolightning.optim.estimators import TwoSided
from zolightning.optim.precision import UpdatePrecision
from zolightning.optim.probing import evaluate_probes, losses_at, of_whole_parameters
from zolightning.optim.share import WHOLE

_SAMPLE = 2**16  # elements of a tensor that are examined
_LARGER = 2.0**20  # a factor by which updates are enlarged so that none is lost
_POINTS, _SPACING, _ORDER = 8, 0.05, 4  # number and spacing of weights at which the loss is evaluated; difference order


@dataclass(frozen=True)
class Survival:
    """Compares intended changes of elements with the changes that remain after rounding, by sums over elements."""

    meant: int = 0  # number of elements that should change
    changed: int = 0  # number of those that do change
    product: float = 0.0  # sum of products of the intended and the real change
    square: float = 0.0  # sum of squares of the intended change

    @classmethod
    def of(cls, meant: Tensor, real: Tensor) -> "Survival":
        """Compares changes, both (n,), float64."""
        should = meant != 0
        changed = int((should & (real != 0)).sum())
        return cls(int(should.sum()), changed, (meant * real).sum().item(), meant.square().sum().item())

    def __add__(self, other: "Survival") -> "Survival":
        return Survival(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    @property
    def share(self) -> float:
        """The share of the elements that should change which do change; NaN if none should."""
        return self.changed / self.meant if self.meant else math.nan

    @property
    def size(self) -> float:
        """How far elements move in the intended direction, on average: 1 for the intended distance."""
        return self.product / self.square if self.square else math.nan


class _Watched(LowRank):
    """A low-rank perturbation that records whether it was added to a weight, or to rows of it."""

    is_built = False

    def add_to(self, weight: Tensor, out: Tensor, start: int = 0) -> None:
        self.is_built = True
        super().add_to(weight, out, start)

    def add_to_rows(self, table: Tensor, rows: Tensor, out: Tensor) -> None:
        self.is_built = True
        super().add_to_rows(table, rows, out)


@torch.no_grad()
def perturbation_survival(optimizer: ZerothOrderOptimizer, loss_fn: LossFunction) -> dict[str, Survival]:
    """How much of ``eps z`` is left in the perturbed weights ``W + eps z``, for one direction, by parameter's name.

    Parameters are left out if their low-rank perturbation is added to the output of a layer, where no perturbed weight
    is rounded. A weight that is read in two ways, such as a tied embedding, is included if one of them rounds.

    Args:
        optimizer: a method that is attached to a module.
        loss_fn: computes the loss of one batch; called once if perturbations are of low rank.
    """
    changes = optimizer.perturbations(0, 1)
    larger = max(1.0, 2.0 ** -math.floor(math.log2(optimizer.param_groups[0]["eps"])))
    with _eps_times(optimizer, larger):
        large = optimizer.perturbations(0, 1)
    rounded, found = _rounded(optimizer, changes, loss_fn), {}
    for _, name, parameter in optimizer.trainable():
        if parameter not in rounded:
            continue
        part = optimizer.slices.get(parameter)
        weight = parameter.contiguous() if part is None else part.take(parameter)
        before, (real, meant) = _sample(weight), (torch.empty_like(weight) for _ in range(2))
        changes[parameter].add_to(weight, real)
        large[parameter].add_to(weight, meant)
        found[name] = Survival.of((_sample(meant) - before) / larger, _sample(real) - before)
    return found


@torch.no_grad()
def update_survival(optimizer: ZerothOrderOptimizer, record: StepRecord, lr: Sequence[float]) -> dict[str, Survival]:
    """How much of a step's update is left in the weights and their extra bits, by parameter's name.

    The intended update is known from a step with learning rates a million times as large, in which nothing is lost,
    because updates are linear in the learning rate. Weights and state are unchanged afterwards.

    Args:
        optimizer: the method.
        record: the record of a step in the present subspaces.
        lr: the learning rate of each parameter group.
    """
    start, chosen = WeightsAndState(optimizer), optimizer.update_precision
    names = {name: parameter for _, name, parameter in optimizer.trainable()}

    def changes(precision: UpdatePrecision, factor: float) -> dict[str, Tensor]:
        before = {name: _sample(optimizer.completed(parameter)) for name, parameter in names.items()}
        try:
            optimizer.update_precision = precision
            optimizer.apply(replace(record, lr=tuple(factor * rate for rate in lr)))
            optimizer.fold()
            return {name: _sample(optimizer.completed(p)) - before[name] for name, p in names.items()}
        finally:
            optimizer.update_precision = chosen
            start.put_back()

    real, meant = changes(chosen, 1.0), changes("exact", _LARGER)
    return {name: Survival.of(meant[name] / _LARGER, real[name]) for name in names}


@torch.no_grad()
def loss_noise(optimizer: ZerothOrderOptimizer, loss_fn: LossFunction) -> float:
    """Standard deviation of the error that rounding adds to the loss of a batch.

    The loss is evaluated at weights that are close to each other on a line, W plus and minus 0.65 to 1 times ``eps z``.
    Differences of order 4 of a smooth function nearly vanish there, while those of independent noise of variance s^2
    have variance 70 s^2; 70, the binomial coefficient (8 over 4), is the sum of squares of their coefficients (Moré and
    Wild, "Estimating Computational Noise", SIAM J. Sci. Comput. 33, 2011).

    Args:
        optimizer: a method that is attached to a module.
        loss_fn: computes the loss of one batch, always the same one; called 16 times.
    """
    estimator, losses = TwoSided(), []
    for point in range(_POINTS):
        with _eps_times(optimizer, 1 - _SPACING * point):
            losses.append(evaluate_probes(optimizer, estimator, estimator.probes(1), loss_fn, WHOLE, False).losses)
    differences = torch.tensor(losses, dtype=torch.float64).diff(n=_ORDER, dim=0)
    return math.sqrt(differences.square().mean().item() / math.comb(2 * _ORDER, _ORDER))


def spacing(weight: nn.Parameter) -> float:
    """The distance between neighbouring numbers of a weight's dtype at the RMS of its elements."""
    rms = math.sqrt(_sample(weight.detach()).square().mean().item())
    info = torch.finfo(weight.dtype)
    return math.ldexp(info.eps, math.frexp(max(rms, info.tiny))[1] - 1)


def _rounded(
    optimizer: ZerothOrderOptimizer, changes: Mapping[nn.Parameter, Perturbation], loss_fn: LossFunction
) -> set[nn.Parameter]:
    """The parameters whose perturbed weights are built, and so rounded, in an evaluation."""
    watched = {
        parameter: _Watched(change.basis, change.shape, change.pending, change.direction)
        for parameter, change in changes.items()
        if isinstance(change, LowRank)
    }
    if watched:
        perturbations = of_whole_parameters(optimizer, {**changes, **watched})
        losses_at(optimizer, [perturbations], loss_fn, WHOLE, leaves_traces=False)
    return {parameter for parameter in changes if parameter not in watched or watched[parameter].is_built}


@contextmanager
def _eps_times(optimizer: ZerothOrderOptimizer, factor: float) -> Iterator[None]:
    before = [group["eps"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["eps"] *= factor
        yield
    finally:
        for group, eps in zip(optimizer.param_groups, before, strict=True):
            group["eps"] = eps


def _sample(tensor: Tensor) -> Tensor:
    """A copy of some elements of a tensor, float64, in host memory; the same elements for all tensors of one size."""
    flat = tensor.reshape(-1)
    if len(flat) > _SAMPLE:
        index = torch.randint(len(flat), (_SAMPLE,), generator=torch.Generator().manual_seed(0))
        flat = flat[index.to(flat.device)]
    return flat.to("cpu", torch.float64, copy=True)
