"""ZO-Muon: orthogonalized zeroth-order gradients in a random subspace."""

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

from torch import Tensor

from zolightning.checks import require_choice
from zolightning.optim.common import SubspaceAndEstimator, Unpack
from zolightning.optim.orthogonalization import msign, newton_schulz
from zolightning.optim.precision import State
from zolightning.optim.subspace import SubspaceOptimizer

Orthogonalization = Literal["newton_schulz", "svd"]


class ZOMuon(SubspaceOptimizer):
    """ZO-Muon (arXiv 2602.17155): Muon on estimated gradients, in a random subspace.

    Directions are ``P Psi_i`` with P (m, r) Haar-orthonormal, drawn anew at each resampling, and Psi_i (r, n) drawn at
    each step. The core gradient G is the mean of ``g_i Psi_i`` over the queries, and the weight moves by
    ``-lr * P msign(G)``, where msign replaces all singular values by 1. The step does not depend on the scale of the
    loss, only on the ratios of the projected gradients of a step: use several queries.

    State: P, (m, r) in the weight's dtype; the core, (r, n) in fp32, while it holds updates; momentum, the same again.

    Differs from the released code: a resampling step uses one basis for all its evaluations (there, all queries but one
    are updated along different directions from their evaluations), Newton-Schulz runs in fp32 instead of the weight's
    dtype, and the learning rate of biases and norms is an argument that schedulers scale.

    Args:
        params: parameters or parameter groups.
        lr: each of the r singular values of the step, in weight units; with `normalize_directions` the RMS of a
            weight's step.
        eps: perturbation scale of the core; of a weight it is ``eps * sqrt(r / m)``.
        rank: r.
        orthogonalization: "newton_schulz" (five steps; singular values land in [0.68, 1.20]) or "svd" (exact).
        momentum: decay of the mean of core gradients, taken before orthogonalization; the paper has none.
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
        orthogonalization: Orthogonalization = "newton_schulz",
        momentum: float = 0.0,
        vector_lr: float = 1e-7,
        num_queries: int = 4,
        **common: Unpack[SubspaceAndEstimator],
    ) -> None:
        require_choice("orthogonalization", orthogonalization, get_args(Orthogonalization))
        self.orthogonalization = orthogonalization
        defaults = {"lr": lr, "eps": eps, "momentum": momentum}
        super().__init__(params, defaults, rank=rank, vector_lr=vector_lr, num_queries=num_queries, **common)

    def core_step(self, gradients: Tensor, states: list[State], group: dict[str, Any]) -> Tensor:
        steps = msign(gradients) if self.orthogonalization == "svd" else newton_schulz(gradients)
        return steps * math.sqrt(max(steps.shape[1:])) if self.normalize_directions else steps
