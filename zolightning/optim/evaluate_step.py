"""The first half of a step: its losses become projected gradients, and these a record."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from zolightning.evaluation.examples import MicroBatches
from zolightning.evaluation.losses import LossFunction
from zolightning.messages import some
from zolightning.optim.alignment import aligned
from zolightning.optim.estimators import TwoSided
from zolightning.optim.probing import Probe, Probed, evaluate_probes
from zolightning.optim.record import FLAT_IN_A_ROW, MAX_NONFINITE_IN_A_ROW, Estimate, NonFiniteLossError, StepRecord
from zolightning.optim.share import WHOLE, Share
from zolightning.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from zolightning.optim.base import ZerothOrderOptimizer


def evaluate_step(
    optimizer: "ZerothOrderOptimizer",
    last: Estimate,
    loss_fn: LossFunction,
    share: Share,
    skip_nonfinite: bool,
    micro_batches: MicroBatches | None,
) -> StepRecord:
    """Evaluates the losses of a step and makes its record, which has no projected gradients if one is not finite.

    `last` is the optimizer's last estimate, which counts steps in a row whose losses are all equal or not finite. The
    other arguments and the exceptions are those of ``optimizer.estimate``.
    """
    moving = [optimizer.named(group) for group in optimizer.param_groups]
    found = optimizer.estimator.evaluate(optimizer, loss_fn, share, micro_batches)
    _require_same(moving, optimizer)
    last.flat_in_a_row = last.flat_in_a_row + 1 if found.is_flat else 0
    if last.flat_in_a_row == FLAT_IN_A_ROW:  # perhaps weights are now read where perturbations do not reach them
        optimizer.evaluator.forget()
    elif last.flat_in_a_row == FLAT_IN_A_ROW + 1:
        rank_zero_warn(
            f"All losses of a step were equal, {FLAT_IN_A_ROW + 1} steps in a row, so nothing is learned: the loss "
            f"does not depend on the parameters that train, or `eps` ({optimizer.param_groups[0]['eps']:g}) is too "
            "small to change it."
        )
    _count_nonfinite(found, last, skip_nonfinite, optimizer.param_groups[0]["step"])
    if optimizer.align_queries and found.is_finite:
        found = found._replace(projected_grads=aligned(optimizer, found.projected_grads, warns=last.record is None))
    return _record_of(found, optimizer)


@torch.no_grad()
def squared_grad(
    optimizer: "ZerothOrderOptimizer", block: int, num_queries: int = 1, *, loss_fn: LossFunction, share: Share = WHOLE
) -> float:
    """The mean squared projected gradient of one block along `num_queries` directions, with everything else at rest.

    Its expectation is ``grad' S grad``, where S is the covariance of the method's directions: the squared norm of the
    block's gradient for MeZO, and ``grad' H^-1 grad`` for directions scaled by ``H^-1/2``. With one query the relative
    standard deviation is sqrt(2). It costs ``2 num_queries`` evaluations, which the next record counts. The directions
    differ from those of every step.

    Returns:
        The mean, or 0 if a loss is not finite.
    """
    estimator = TwoSided()
    probes = [Probe(optimizer.num_queries + query, sign) for query, sign in estimator.probes(num_queries)]
    with optimizer.only(block):
        grads = evaluate_probes(optimizer, estimator, probes, loss_fn, share, leaves_traces=False).projected_grads
    optimizer.count(len(probes))
    mean = sum(grad * grad for grad in grads) / len(grads)
    return mean if math.isfinite(mean) else 0.0


def _require_same(moving: Sequence[Mapping[nn.Parameter, str]], optimizer: "ZerothOrderOptimizer") -> None:
    """Raises a ValueError unless the step will move those parameters that it has perturbed."""
    for before, group in zip(moving, optimizer.param_groups, strict=True):
        if (now := optimizer.named(group)) is not before:
            names = sorted({before.get(p) or now[p] for p in before.keys() ^ now.keys()})
            raise ValueError(
                f"The loss has changed `requires_grad` of {some(names)}, as `set_adapter` of PEFT does, but a step "
                "moves what it has perturbed. Let the loss restore it, or set it before the step."
            )


def _count_nonfinite(found: Probed, last: Estimate, skip_nonfinite: bool, step: int) -> None:
    """Counts steps in a row with a loss that is not finite; raises if there are more of them than may be skipped."""
    last.nonfinite_in_a_row = 0 if found.is_finite else last.nonfinite_in_a_row + (not found.is_empty)
    if last.nonfinite_in_a_row > (MAX_NONFINITE_IN_A_ROW if skip_nonfinite else 0) and not found.is_empty:
        values = ", ".join(f"{loss:g}" for loss in found.losses)
        many = f", nor in the {MAX_NONFINITE_IN_A_ROW} steps before, which were skipped" if skip_nonfinite else ""
        raise NonFiniteLossError(f"The loss is not finite at step {step}{many}: {values}.")


def _record_of(found: Probed, optimizer: "ZerothOrderOptimizer") -> StepRecord:
    groups = optimizer.param_groups
    first, weight = groups[0], groups[0].get("block_weight", 1.0)
    return StepRecord(
        step=first["step"],
        seed=first["seed"],
        lr=tuple(float(group["lr"]) * optimizer.lr_scale * weight for group in groups),
        projected_grads=tuple(found.projected_grads) if found.is_finite else (),
        losses=tuple(found.losses),
        forward_passes=len(found.losses) * optimizer.estimator.forwards + first.get("measured", 0),
        refresh=first.get("refresh", 0),
        folds=first.get("folds", 0),
        blocks=optimizer.active,
        given="given" in first and first["given"] == first["refresh"] != 0,
        leaves_traces=optimizer.evaluator.left_traces,
    )
