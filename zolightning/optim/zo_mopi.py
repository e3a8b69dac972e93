"""ZO-MOPI: momentum in a subspace, partially orthogonalized by streaming power iteration."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zolightning.checks import require_integer
from zolightning.optim.common import SubspaceAndEstimator, Unpack
from zolightning.optim.orthogonalization import power_iteration
from zolightning.optim.precision import State
from zolightning.optim.subspace import SubspaceOptimizer


class ZOMOPI(SubspaceOptimizer):
    """ZO-MOPI (arXiv 2605.09034): equal steps along the k dominant directions of the momentum, and none along the rest.

    Directions are ``A B_i`` with A (m, r) orthonormal, drawn anew at each resampling, and B_i (r, n) drawn at each
    step. The core gradient, the mean of ``g_i B_i``, enters the momentum M. One power iteration, starting from the V of
    the step before, gives a matrix ``U V'`` of rank k and Frobenius norm sqrt(k), and the weight moves by
    ``-lr * A U V'``. The norm of that step is ``lr * sqrt(k)``: scale `lr` with ``1 / sqrt(k)`` to compare values of k.

    The first V comes from the singular value decomposition of the first M (in the paper it is random).

    State: A, (m, r) in the weight's dtype; in fp32 M, (r, n), V, (n, k), and the core, (r, n), while it holds updates.

    Differs from the released code where that differs from the paper: M starts from zero, is projected onto the new
    subspace at each resampling (equation 11) and keeps its V, and the weights and the first query of a resampling step
    are not corrupted. The default estimator is the paper's, ``TwoSided()``; the code's is ``OneSided()``.

    Args:
        params: parameters or parameter groups.
        lr: each of the k singular values of the step, in weight units; with `normalize_directions` the RMS of a
            weight's step, for any k.
        eps: perturbation scale of the core; of a weight it is ``eps * sqrt(r / m)``.
        rank: r.
        power_rank: k, at most `rank`; fewer for a matrix with fewer columns.
        momentum: decay of the mean of core gradients, above 0 in the paper.
        vector_lr: learning rate of biases and norms, which are searched along dense directions. Unlike the step of
            matrices, theirs is proportional to the projected gradients, and so to the scale of the loss.
        num_queries: directions per step.
        **common: align_queries, estimator, noise, normalize, normalize_directions, clip, rms_decay,
            seed, update_precision, offload_low_words: see
            :class:`~zolightning.optim.subspace.SubspaceOptimizer`.
    """

    sides = "left"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-3,
        rank: int = 64,
        power_rank: int = 32,
        momentum: float = 0.9,
        vector_lr: float = 1e-7,
        num_queries: int = 4,
        **common: Unpack[SubspaceAndEstimator],
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "momentum": momentum, "power_rank": power_rank}
        super().__init__(params, defaults, rank=rank, vector_lr=vector_lr, num_queries=num_queries, **common)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        require_integer("power_rank", group["power_rank"])
        if group["power_rank"] > group["rank"]:
            raise ValueError(f"`power_rank` must be at most `rank`, {group['rank']}, got {group['power_rank']}.")

    def core_step(self, gradients: Tensor, states: list[State], group: dict[str, Any]) -> Tensor:
        columns = min(group["power_rank"], *gradients.shape[1:])
        for state, gradient in zip(states, gradients, strict=True):
            if "right_basis" not in state or state["right_basis"].shape != (gradient.shape[1], columns):
                # The leading right singular vectors of the first momentum itself: no draw, no warm-up.
                state["right_basis"] = torch.linalg.svd(gradient, full_matrices=False).Vh[:columns].T.contiguous()
        steps, right = power_iteration(gradients, torch.stack([state["right_basis"] for state in states]))
        for state, basis in zip(states, right, strict=True):
            state["right_basis"] = basis.clone()
        return steps * math.sqrt(math.prod(steps.shape[1:]) / columns) if self.normalize_directions else steps
