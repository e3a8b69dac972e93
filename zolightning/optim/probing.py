"""Evaluates losses at perturbed weights and turns them into projected gradients."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from zolightning.directions.opposite import Opposite, have_opposites
from zolightning.directions.perturbation import Perturbation
from zolightning.directions.slices import SlicedPerturbation
from zolightning.evaluation.examples import MicroBatches
from zolightning.evaluation.losses import LossAndTerms, LossFunction, require_terms
from zolightning.optim.share import Share

if TYPE_CHECKING:
    from zolightning.optim.base import ZerothOrderOptimizer
    from zolightning.optim.estimators import Estimator

ByQuery = Mapping[int, Mapping[nn.Parameter, Perturbation]]


class Probe(NamedTuple):
    """One evaluation of the loss, at ``W + sign * eps * z_query``."""

    query: int
    sign: int  # +1, -1, or 0 for the unperturbed weights


class Probed(NamedTuple):
    """The result of some probes.

    Attributes:
        losses: one for each probe; NaN if there was no term to average.
        projected_grads: one for each query.
        is_empty: whether there was no term.
        at_one_point: whether all losses are of the same weights and therefore equal.
    """

    losses: list[float]
    projected_grads: list[float]
    is_empty: bool
    at_one_point: bool = False

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, self.losses))

    @property
    def is_flat(self) -> bool:
        """Whether all losses are equal to the last bit though their weights differ, so that there is no signal."""
        are_equal = len(self.losses) > 1 and self.is_finite and all(loss == self.losses[0] for loss in self.losses)
        return are_equal and not (self.at_one_point and any(self.projected_grads))


def evaluate_probes(
    optimizer: "ZerothOrderOptimizer",
    estimator: "Estimator",
    probes: Sequence[Probe],
    loss_fn: LossFunction,
    share: Share,
    leaves_traces: bool = True,
) -> Probed:
    """Evaluates a loss at the perturbed weights of each probe.

    It synchronizes with the device once, when it reads all results at the end.

    The `probes` are in the order that the estimator expects, and the module keeps the changes that the first of them
    makes to it if it `leaves_traces`. The other arguments are those of ``Estimator.evaluate``.
    """
    own = share.of(len(probes))
    size = optimizer.evaluator.evaluations_per_forward
    runs = [probes[start : min(start + size, own.stop)] for start in range(own.start, own.stop, size)]
    perturbations = perturbations_at(optimizer, runs)
    first = partial(perturbations_at, optimizer, [probes[: min(size, replace(share, index=0).of(len(probes)).stop)]])
    results = losses_at(optimizer, perturbations, loss_fn, share, first, leaves_traces) if own else []
    losses, terms = _over_ranks(optimizer, results, len(probes), share)
    grads = estimator.projected_grads(losses, optimizer.param_groups[0]["eps"])
    numbers, count = torch.cat([losses, terms, grads]).tolist(), len(probes)
    require_terms(numbers[count : 2 * count])
    return Probed(numbers[:count], numbers[2 * count :], 0 in numbers[count : 2 * count])


def losses_along(
    optimizer: "ZerothOrderOptimizer",
    moves: Sequence[Mapping[nn.Parameter, Perturbation]],
    loss_fn: LossFunction,
    share: Share,
) -> list[float]:
    """The loss of a step at further points, for an estimator that chooses them from the losses that it has seen.

    Like the losses of probes they are evaluated with the step's random numbers, shared by ranks and averaged over them,
    and counted as forward passes of the step. The module is as the step's first evaluation has left it.

    Args:
        optimizer: the method.
        moves: for each point, what is added to the parameters, each in its trainable shape, besides pending updates:
            ``optimizer.directions(group, group["seed"], group["step"], {query: 0.1})``, for example.
        loss_fn, share: see :meth:`~zolightning.optim.base.ZerothOrderOptimizer.estimate`.

    Returns:
        One loss for each point, the same on all ranks; NaN if there was no term to average.
    """
    whole = [of_whole_parameters(optimizer, {**optimizer.offsets(), **moves[place]}) for place in share.of(len(moves))]
    results = losses_at(optimizer, whole, loss_fn, share, leaves_traces=False) if whole else []
    losses, terms = _over_ranks(optimizer, results, len(moves), share)
    optimizer.count(len(moves))
    numbers = torch.cat([losses, terms]).tolist()
    require_terms(numbers[len(moves) :])
    return numbers[: len(moves)]


def _over_ranks(
    optimizer: "ZerothOrderOptimizer", results: Sequence[LossAndTerms], count: int, share: Share
) -> tuple[Tensor, Tensor]:
    """The losses of `count` evaluations and their numbers of terms, each float64, (count,), of this rank's results."""
    sums = [sums_of(terms, loss) for loss, terms in results]
    if len(sums) == count:
        totals = torch.stack(sums)
    else:  # evaluations of other ranks are zeros, to which the sum over ranks adds them
        totals = torch.zeros(count, 2, dtype=torch.float64, device=device_of(optimizer))
        for place, values in zip(share.of(count), sums, strict=True):
            totals[place] = values
    totals = totals if share.sum is None else share.sum(totals)
    return totals[:, 0] / totals[:, 1], totals[:, 1]


def perturbations_at(
    optimizer: "ZerothOrderOptimizer", runs: Iterable[Sequence[Probe]]
) -> list[Mapping[nn.Parameter, Perturbation]]:
    """The perturbations of whole parameters for the probes of some runs of the network, one run after the other.

    Probes of one run are asked for together, so that what they have in common is made once. Those of different runs are
    not asked for together: their keys would lie elsewhere in the same tables, and each would need a CUDA graph of its
    own. Only the first sign of a query is asked for: the other is its opposite.
    """
    made: dict[tuple[int, ...], tuple[int, ByQuery]] = {}  # with one sign, which comes first
    found: list[Mapping[nn.Parameter, Perturbation]] = []
    for run in runs:
        by_sign: dict[int, ByQuery] = {}
        for sign in dict.fromkeys(probe.sign for probe in run if probe.sign):
            queries = tuple(query for query, other in run if other == sign)
            if queries in made and made[queries][0] != sign:
                by_sign[sign] = {query: Opposite(changes) for query, changes in made[queries][1].items()}
                continue
            own = optimizer.perturbations_of(queries, sign)
            by_sign[sign] = {query: of_whole_parameters(optimizer, changes) for query, changes in own.items()}
            if all(map(have_opposites, own.values())):
                made[queries] = sign, by_sign[sign]
        for query, sign in run:
            found.append(by_sign[sign][query] if sign else of_whole_parameters(optimizer, optimizer.offsets()))
    return found


def losses_at(
    optimizer: "ZerothOrderOptimizer",
    perturbations: Sequence[Mapping[nn.Parameter, Perturbation]],
    loss_fn: LossFunction,
    share: Share,
    first: Callable[[], Sequence[Mapping[nn.Parameter, Perturbation]]] | None = None,
    leaves_traces: bool = True,
    micro_batches: MicroBatches | None = None,
) -> list[LossAndTerms]:
    """The loss at each of some perturbations of whole parameters, and the number of terms that it averages.

    Its arguments are those of :func:`evaluate_probes` and of ``Evaluator.evaluate``; `first` makes the perturbations of
    the step's first run of the network, whichever rank makes it.
    """
    group, trainable = optimizer.param_groups[0], dict[nn.Parameter, str]()
    for own in optimizer.param_groups:
        trainable |= optimizer.named(own)
    run, at_rest = (group["seed"], group["step"], share.stream), {p: name for name, p in optimizer.at_rest()}
    first = first if share.index and leaves_traces else None
    evaluate = optimizer.evaluator.evaluate
    return evaluate(loss_fn, trainable, perturbations, run, at_rest, leaves_traces, micro_batches, first)


def device_of(optimizer: "ZerothOrderOptimizer") -> torch.device:
    """The device of the first parameter that moves, where losses are collected."""
    return next(parameter.device for _, _, parameter in optimizer.trainable())


def sums_of(terms: Tensor, *means: Tensor) -> Tensor:
    """Means times their number of terms, and that number, (means + 1,); a mean over no terms, maybe NaN, becomes 0."""
    return torch.stack([*(torch.where(terms == 0, 0, mean * terms) for mean in means), terms])


def of_whole_parameters(
    optimizer: "ZerothOrderOptimizer", perturbations: Mapping[nn.Parameter, Perturbation]
) -> dict[nn.Parameter, Perturbation]:
    """Perturbations of whole parameters, given those of their trained slices."""
    parts = {parameter: part for parameter, part in optimizer.slices.items() if parameter in perturbations}
    return {**perturbations, **{p: SlicedPerturbation(perturbations[p], part) for p, part in parts.items()}}
