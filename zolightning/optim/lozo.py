"""LOZO: low-rank directions whose row space stays the same for several steps."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from zolightning.optim.common import SubspaceSettings, Unpack
from zolightning.optim.precision import State
from zolightning.optim.subspace import SubspaceOptimizer


class LOZO(SubspaceOptimizer):
    """LOZO and, with `momentum`, LOZO-M (arXiv 2410.07698).

    Directions are ``U V'`` with V (n, r) Gaussian, drawn anew at each resampling, and U (m, r) drawn at each step. The
    weight moves by ``-lr * g * U V' / r``, an unbiased step for any rank. Entries of a direction have variance r, so
    the perturbation of a weight has standard deviation ``eps * sqrt(r)``.

    State: V, (n, r) in the weight's dtype; the core, (m, r) in fp32, while it holds updates; momentum, the same again.

    Differs from the authors' code (optsuite/LOZO, commit 66bd55f), which does not divide by r, and on each resampling
    step updates along a different U from the one it perturbed along. To use a learning rate published for that code,
    set `lr` to r times that rate and `vector_lr` to the rate itself; one published for the paper's formula, which
    divides by r, is the value of both. That code's momentum starts from ``g U`` and is projected by
    ``V_old' V_new / n``; here it starts from zero and is projected by least squares.

    Args:
        params: parameters or parameter groups.
        lr: step size, as in SGD: the core moves by ``lr * projected_grad / rank`` along a unit-variance direction.
        eps: perturbation scale of the core.
        rank: r.
        momentum: decay of the mean of core gradients, 0.9 in the paper's LOZO-M; 0 keeps none.
        betas: Adam's decay rates, instead of `momentum`, for biases and norms too. Adam's step is divided by r as well.
        vector_lr: learning rate of biases and norms, not divided by r, as in MeZO. None takes `lr`, which is SGD with
            one learning rate for all parameters.
        **common: num_queries, align_queries, estimator, noise, normalize, normalize_directions, clip, rms_decay,
            seed, update_precision, offload_low_words: see
            :class:`~zolightning.optim.subspace.SubspaceOptimizer`.
    """

    sides = "right"
    unit = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        eps: float = 1e-3,
        rank: int = 2,
        momentum: float = 0.0,
        betas: tuple[float, float] | None = None,
        vector_lr: float | None = None,
        **common: Unpack[SubspaceSettings],
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "momentum": momentum, "betas": betas}
        super().__init__(params, defaults, rank=rank, vector_lr=vector_lr, **common)

    def core_step(self, gradients: Tensor, states: list[State], group: dict[str, Any]) -> Tensor:
        return gradients if self.normalize_directions else gradients / gradients.shape[-1]
