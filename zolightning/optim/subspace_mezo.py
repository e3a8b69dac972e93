"""Subspace-MeZO: zeroth-order SGD in a random subspace of the rows."""

from collections.abc import Iterable
from typing import Any

from zolightning.optim.common import SubspaceSettings, Unpack
from zolightning.optim.subspace import SubspaceOptimizer


class SubspaceMeZO(SubspaceOptimizer):
    """Subspace-MeZO, the baseline of ZO-Muon (arXiv 2602.17155): its directions without its orthogonalization.

    Directions are ``P Psi`` with P (m, r) Haar-orthonormal, drawn anew at each resampling, and Psi (r, n) drawn at each
    step. The weight moves by ``-lr * g * P Psi``, whose mean is ``-lr * P P' gradient``. Entries of a direction have
    variance r / m.

    State: P, (m, r) in the weight's dtype; the core, (r, n) in fp32, while it holds updates; each moment, the same
    again.

    Args:
        params: parameters or parameter groups.
        lr: step size; the core moves by ``lr * projected_grad`` along a unit-variance direction.
        eps: perturbation scale of the core; of a weight it is ``eps * sqrt(r / m)``.
        rank: r.
        momentum: decay of the mean of core gradients; 0 keeps none.
        betas: Adam's decays, instead of `momentum`; biases and norms get Adam's steps too.
        vector_lr: learning rate of biases and norms; None takes `lr`.
        **common: num_queries, align_queries, estimator, noise, normalize, normalize_directions, clip, rms_decay,
            seed, update_precision, offload_low_words: see
            :class:`~zolightning.optim.subspace.SubspaceOptimizer`.
    """

    sides = "left"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        eps: float = 1e-3,
        rank: int = 64,
        momentum: float = 0.0,
        betas: tuple[float, float] | None = None,
        vector_lr: float | None = None,
        **common: Unpack[SubspaceSettings],
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "momentum": momentum, "betas": betas}
        super().__init__(params, defaults, rank=rank, vector_lr=vector_lr, **common)
