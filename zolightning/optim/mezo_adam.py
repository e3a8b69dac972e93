"""MeZO-Adam: Adam on the zeroth-order gradient estimate."""

from collections.abc import Iterable
from typing import Any

from zolightning.checks import require_fraction, require_positive
from zolightning.optim.common import DenseSettings, Unpack
from zolightning.optim.dense import StandardDescent


class MeZOAdam(StandardDescent):
    """MeZO-Adam (arXiv 2305.17333, appendix B): Adam on the estimate ``g z`` of the gradient.

    Memory: 8 bytes per parameter for the two moments, besides what :class:`~zolightning.optim.MeZO` needs. In high
    dimension the second moment of ``g z`` is nearly the same for all coordinates, so ``MeZO(normalize=True)`` does the
    same with one number (arXiv 2605.03869). This class is here for comparison.

    Args:
        params: parameters or parameter groups.
        lr: step size, in weight units per step, as in Adam.
        betas: decay rates of the first and second moments.
        denominator_eps: added to the root of the second moment (Adam's epsilon; `eps` is the perturbation scale).
        eps: perturbation scale, in weight units.
        weight_decay: as in :class:`~zolightning.optim.MeZO`.
        **common: num_queries, align_queries, estimator, noise, seed, update_precision: see
            :class:`~zolightning.optim.base.ZerothOrderOptimizer`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        eps: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        denominator_eps: float = 1e-8,
        weight_decay: float = 0.0,
        **common: Unpack[DenseSettings],
    ) -> None:
        adam = {"betas": betas, "denominator_eps": denominator_eps, "weight_decay": weight_decay}
        super().__init__(params, {"lr": lr, "eps": eps} | adam, **common)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        require_fraction("betas[0]", group["betas"][0])
        require_fraction("betas[1]", group["betas"][1])
        require_positive("denominator_eps", group["denominator_eps"])
