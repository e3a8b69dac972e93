"""LOZO: low-rank directions whose row space stays for an interval."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from zolightning.optim.precision import State
from zolightning.optim.subspace import SubspaceOptimizer


class LOZO(SubspaceOptimizer):
    """LOZO and, with `momentum`, LOZO-M (arXiv 2410.07698).

    Directions are ``U V'`` with V (n, r) Gaussian, drawn anew at each resampling, and U (m, r) new at each step; the
    weight moves by ``-lr * g * U V' / r``, which makes the step unbiased whatever the rank. Entries of a direction have
    variance r, so the perturbation of a weight has standard deviation ``eps * sqrt(r)``.

    State: V, (n, r) in the weight's dtype; while updates are pending the core, (m, r) in fp32; momentum, the same
    again.

    Differs from the authors' code (optsuite/LOZO, commit 66bd55f): both of its trainers leave the division by r to the
    learning rate, and update along another U than they perturbed along on each resampling step. A learning rate that
    was published for them is to be multiplied by r for `lr`, and belongs to `vector_lr` as it is; one published for
    code that divides by r, as the paper's formula does, is both. Their momentum starts from ``g U`` and is projected
    by ``V_old' V_new / n``; here it starts from zero and is projected by least squares.

    Args:
        params: parameters or parameter groups.
        lr: step size, that of SGD: the core moves by ``lr * projected_grad / rank`` along a unit-variance direction.
        eps: perturbation scale of the core.
        rank: r.
        momentum: decay of the mean of core gradients, 0.9 in the paper's LOZO-M; 0 keeps none.
        betas: Adam's decays, instead of `momentum`; its step is divided by r like any other. Biases and norms get
            Adam's steps too.
        vector_lr: learning rate of biases and norms, in the units of MeZO's and without a division by r; None takes
            `lr`, which makes both SGD with one rate.
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
        **common: Any,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "momentum": momentum, "betas": None if betas is None else tuple(betas)}
        vector_lr = lr if vector_lr is None else vector_lr
        super().__init__(params, defaults, rank=rank, vector_lr=vector_lr, **common)

    def core_step(self, gradients: Tensor, states: list[State], group: dict[str, Any]) -> Tensor:
        return gradients if self.normalize_directions else gradients / gradients.shape[-1]
