"""ZO-Muon: orthogonalized zeroth-order gradients in a random subspace."""

import math
from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor

from zolightning.optim.checks import require_choice
from zolightning.optim.orthogonalization import msign, newton_schulz
from zolightning.optim.precision import State
from zolightning.optim.subspace import SubspaceOptimizer

Orthogonalization = Literal["newton_schulz", "svd"]
ORTHOGONALIZATIONS: tuple[str, ...] = ("newton_schulz", "svd")


class ZOMuon(SubspaceOptimizer):
    """ZO-Muon (arXiv 2602.17155): the core gradient's singular values are all made 1.

    Directions are ``P Psi``, P (m, r) Haar-orthonormal, drawn anew at each resampling, Psi_i (r, n) new at each step;
    the core gradient is the mean of ``g_i Psi_i`` over queries, and the weight moves by ``-lr * P msign`` of it.
    The scale of the loss does not matter, only the ratios of the projected gradients of a step: use several queries.

    State: P, (m, r) in the weight's dtype; while updates are pending the core, (r, n) in fp32; momentum, the same
    again.

    A basis is rounded to the weight's dtype, so a bf16 run does not follow an fp32 run bit for bit even with the same
    losses: it ends 0.2 to 1.5 % of the distance moved beside it.

    Differs from the released code: a basis is drawn once a step, not once an evaluation (there all but one query of
    a resampling step are updated along other directions than they were evaluated at), Newton-Schulz runs in fp32
    instead of the weight's dtype, and the learning rate of vectors is an argument and scheduled.

    Args:
        params: parameters or parameter groups.
        lr: length of the step: each of the r singular values of a core's step, in weight units; with
            `normalize_directions` the RMS of a weight's step.
        eps: perturbation scale of the core; of a weight it is ``eps * sqrt(r / m)``.
        rank: r.
        orthogonalization: "newton_schulz" (five steps; singular values land in [0.68, 1.20]) or "svd" (exact).
        momentum: decay of the mean of core gradients, taken before orthogonalization; the paper has none.
        vector_lr: learning rate of biases and norms, which move along dense directions in proportion to the projected
            gradients: unlike that of matrices their step grows with the loss's scale.
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
        orthogonalization: Orthogonalization = "newton_schulz",
        momentum: float = 0.0,
        vector_lr: float = 1e-7,
        num_queries: int = 4,
        **common: Any,
    ) -> None:
        require_choice("orthogonalization", orthogonalization, ORTHOGONALIZATIONS)
        self.orthogonalization = orthogonalization
        defaults = {"lr": lr, "eps": eps, "momentum": momentum}
        super().__init__(params, defaults, rank=rank, vector_lr=vector_lr, num_queries=num_queries, **common)

    def core_step(self, gradients: Tensor, states: list[State], group: dict[str, Any]) -> Tensor:
        steps = msign(gradients) if self.orthogonalization == "svd" else newton_schulz(gradients)
        return steps * math.sqrt(max(steps.shape[1:])) if self.normalize_directions else steps
