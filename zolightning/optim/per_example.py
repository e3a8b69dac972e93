"""Evaluates each example of a batch at weights perturbed along its own direction (``PerExample()``)."""

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import nn

from zolightning.directions.perturbation import Perturbation
from zolightning.evaluation.examples import MicroBatches
from zolightning.evaluation.losses import LossFunction, require_terms
from zolightning.optim.probing import Probe, Probed, device_of, losses_at, perturbations_at, sums_of
from zolightning.optim.share import Share

if TYPE_CHECKING:
    from zolightning.optim.base import ZerothOrderOptimizer
    from zolightning.optim.estimators import PerExample


def evaluate_examples(
    optimizer: "ZerothOrderOptimizer",
    estimator: "PerExample",
    loss_fn: LossFunction,
    share: Share,
    micro_batches: MicroBatches | None,
) -> Probed:
    """Evaluates each example at the weights of its query, with both signs.

    The arguments are those of ``Estimator.evaluate``.

    Returns:
        The projected gradients, and as losses the means over the batch for each sign.
    """
    if micro_batches is None:
        raise ValueError(
            "`estimator` is PerExample(), which needs the loss of each example: give `micro_batches` to `estimate` or "
            "`zeroth_order_step`, as the ZerothOrder callback does, or choose TwoSided()."
        )
    count = optimizer.num_queries
    probes = estimator.probes(count)
    own = share.of(len(probes))
    queries = [number % count for batch in micro_batches for number in batch.examples]
    distinct = tuple(dict.fromkeys(queries))

    def perturbations_of(places: Iterable[int]) -> list[Mapping[nn.Parameter, Perturbation]]:
        runs = [[Probe(query, probes[place].sign) for query in distinct] for place in places]
        found, made = iter(perturbations_at(optimizer, runs)), []
        for _ in runs:
            by_query = dict(zip(distinct, found, strict=False))
            made += [by_query[query] for query in queries]
        return made

    first, perturbations = partial(perturbations_of, [0]), perturbations_of(own)
    results = losses_at(optimizer, perturbations, loss_fn, share, first, micro_batches=micro_batches) if own else []
    # Evaluations and examples of other ranks are zeros, to which the sum over ranks adds them.
    device = results[0].loss.device if results else device_of(optimizer)
    table = torch.zeros(len(probes), count, 2, dtype=torch.float64, device=device)
    for (place, query), (loss, terms) in zip(product(own, queries), results, strict=True):
        table[place, query] += sums_of(terms, loss).to(table)
    table = table if share.sum is None else share.sum(table)
    sums, terms = table.unbind(-1)  # each (evaluations, queries)
    shares = sums / terms.sum(dim=1, keepdim=True)  # what each query contributes to the batch's loss
    grads = estimator.projected_grads(count * shares.T.flatten(), optimizer.param_groups[0]["eps"])
    numbers = torch.cat([shares.sum(dim=1), terms.sum(dim=1), terms.amin()[None], grads]).tolist()
    losses, all_terms, (least, *projected_grads) = numbers[:2], numbers[2:4], numbers[4:]
    require_terms([least])
    return Probed(losses, projected_grads, 0 in all_terms)
