"""ZO-MOPI: momentum in a subspace, partially orthogonalized by streaming power iteration."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zolightning.optim.checks import require_positive
from zolightning.optim.orthogonalization import power_iteration
from zolightning.optim.precision import State
from zolightning.optim.subspace import SubspaceOptimizer


class ZOMOPI(SubspaceOptimizer):
    """ZO-MOPI (arXiv 2605.09034): the k dominant directions of the momentum get equal steps, the others none.

    Directions are ``A B``, A (m, r) orthonormal, drawn anew at each resampling, B_i (r, n) new at each step. The core
    gradient, the mean of ``g_i B_i``, enters a momentum M, one power iteration from the V of the step before gives an
    ``U V'`` of rank k and Frobenius norm sqrt(k), and the weight moves by ``-lr * A U V'``. That step is
    ``lr * sqrt(k)`` long: to compare values of k at steps of one length, scale `lr` with ``1 / sqrt(k)``.

    The first V is that of the exact singular value decomposition of the first M (the paper starts from a random one);
    from then on it is what the power iterations make of it.

    State: A, (m, r) in the weight's dtype; M, (r, n), V, (n, k), and while updates are pending the core, (r, n), in
    fp32.

    A basis is rounded to the weight's dtype, so a bf16 run does not follow an fp32 run bit for bit even with the same
    losses: it ends 0.2 to 1.5 % of the distance moved beside it.

    Differs from the released code, by keeping to the paper: M starts from zero, is moved into the new subspace at
    each resampling (equation 11) and keeps its V; the weights and the first query of a resampling step are not
    corrupted. The estimator is the paper's two-sided one by default; ``OneSided()`` gives the code's.

    Args:
        params: parameters or parameter groups.
        lr: length of the step: each of the k singular values of a core's step, in weight units; with
            `normalize_directions` the RMS of a weight's step, whatever k is.
        eps: perturbation scale of the core; of a weight it is ``eps * sqrt(r / m)``.
        rank: r.
        power_rank: k, at most `rank`; less where a matrix has fewer columns. The step grows with its root.
        momentum: decay of the mean of core gradients, above 0 in the paper.
        vector_lr: learning rate of biases and norms, which move along dense directions in proportion to the projected
            gradients (or their mean, with `momentum`): unlike that of matrices their step grows with the loss's scale.
        num_queries: directions a step.
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
        **common: Any,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "momentum": momentum, "power_rank": power_rank}
        super().__init__(params, defaults, rank=rank, vector_lr=vector_lr, num_queries=num_queries, **common)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        require_positive("power_rank", group["power_rank"])
        if group["power_rank"] > group["rank"]:
            raise ValueError(f"`power_rank` must be at most `rank`, {group['rank']}, got {group['power_rank']}.")

    def core_step(self, gradients: Tensor, states: list[State], group: dict[str, Any]) -> Tensor:
        columns = min(group["power_rank"], *gradients.shape[1:])
        for state, gradient in zip(states, gradients, strict=True):
            if "right_basis" not in state:
                # The leading right singular vectors that the first momentum itself gives: no draw, no warm-up.
                state["right_basis"] = torch.linalg.svd(gradient, full_matrices=False).Vh[:columns].T.contiguous()
        steps, right = power_iteration(gradients, torch.stack([state["right_basis"] for state in states]))
        for state, basis in zip(states, right, strict=True):
            state["right_basis"] = basis.clone()
        return steps * math.sqrt(math.prod(steps.shape[1:]) / columns) if self.normalize_directions else steps
