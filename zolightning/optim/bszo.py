"""BSZO: posterior means of the derivatives along a step's directions, in place of the measured ones."""

import math
from collections.abc import Iterable
from typing import Any

from zolightning.checks import require_fraction, require_integer, require_positive
from zolightning.optim.common import Common, Unpack
from zolightning.optim.dense import StandardDescent
from zolightning.optim.estimators import Estimator, OneSided


class BSZO(StandardDescent):
    """BSZO (Feng and Huang, arXiv 2601.01452, section 3): MeZO whose projected gradients are shrunk.

    The derivatives along the k directions z_i of a step are unknown numbers with the prior N(0, p), and each projected
    gradient y_i is a measurement of one of them, with noise of variance s. The weights move by
    ``-lr * sum_i(mu_i z_i)``, where mu is the posterior mean. No measurement involves two directions, and the paper's
    Kalman filter begins anew at every step: so it is one division for each direction (corollary 3.6), and the only
    memory is s (equation 13)::

        s = (1 - smoothing) s + smoothing y_i^2,    mu_i = p y_i / (p + s),    for i = 1..k in turn

    Hence ``|mu_i|`` is at most ``sqrt(p / smoothing) / 2``, and falls where y_i grows further. With a constant s (a
    smoothing of 0) this is :class:`~zolightning.optim.MeZO` with ``OneSided()`` at ``k p / (p + s)`` times the rate.

    Then the paper counts one measurement again, that of the direction of largest posterior variance, as if it were a
    new one (``num_reused=1``, its m = k + 1: algorithm 1 has kept y_i for that, algorithm 2 evaluates the same loss
    once more). Only with ``num_reused=0`` is mu the posterior mean of the model above.

    Differs from the paper's algorithm 1, where s changes only before the measurement that is reused, so that all
    variances are equal: here it changes before every one, as in equation 13, algorithm 2 and the released code
    (AeonianQuill/BSZO). Differs from that code, which uses at least a hundredth of the first value for s.

    Memory: that of :class:`~zolightning.optim.MeZO`, and one number.

    Args:
        params: parameters or parameter groups.
        lr: step size; the moves along a step's directions are added up, not averaged.
        eps: perturbation scale; 1e-4 in the paper.
        prior_variance: p, the variance of the derivative along a direction. None takes a millionth of the number of
            weights that move, as the released code does; the paper gives no value.
        noise_variance: s before the first step, the variance of the noise in a projected gradient; None takes the same.
        smoothing: weight of each projected gradient in s, at least 0 and below 1; 0.1 is the released code's.
        num_reused: how many projected gradients count again in a step; 1 in the paper, 0 for the posterior mean.
        weight_decay: decoupled: ``W -= lr * weight_decay * W`` for parameters of two dimensions or more.
        num_queries: number of random directions in a step, k.
        estimator: which losses a step evaluates; ``OneSided()`` if None.
        **common: align_queries, noise, seed, update_precision: see
            :class:`~zolightning.optim.base.ZerothOrderOptimizer`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        eps: float = 1e-3,
        prior_variance: float | None = None,
        noise_variance: float | None = None,
        smoothing: float = 0.1,
        num_reused: int = 1,
        weight_decay: float = 0.0,
        num_queries: int = 2,
        estimator: Estimator | None = None,
        **common: Unpack[Common],
    ) -> None:
        model = {"prior_variance": prior_variance, "noise_variance": noise_variance}
        filtering = {"smoothing": smoothing, "num_reused": num_reused, "measured_noise": 0.0}  # 0 before the first step
        descent = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        estimator = OneSided() if estimator is None else estimator
        super().__init__(params, descent | model | filtering, num_queries=num_queries, estimator=estimator, **common)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        for name in ("prior_variance", "noise_variance"):
            if group[name] is not None:
                require_positive(name, group[name])
        require_fraction("smoothing", group["smoothing"])
        require_integer("num_reused", group["num_reused"], least=0)

    def transform_grads(self, group: dict[str, Any], projected_grads: tuple[float, ...]) -> tuple[float, ...]:
        prior, noise = self._variances(group)
        means, variances = [0.0] * len(projected_grads), [prior] * len(projected_grads)
        for count in range(len(projected_grads) + group["num_reused"]):
            i = count if count < len(projected_grads) else variances.index(max(variances))
            surprise = projected_grads[i] - means[i]
            noise = (1 - group["smoothing"]) * noise + group["smoothing"] * surprise**2
            means[i] += variances[i] / (variances[i] + noise) * surprise
            variances[i] *= noise / (variances[i] + noise)
        group["measured_noise"] = noise
        return tuple(means)

    def gradient_scale(self, group: dict[str, Any], lr: float) -> float:
        return super().gradient_scale(group, lr) * self.num_queries  # which cancels the division of a mean over queries

    def measurements(self) -> dict[str, float]:
        """The factor by which a projected gradient is multiplied: 1 without noise."""
        prior, noise = self._variances(self.param_groups[0])
        return {"shrinkage": prior / (prior + noise)}

    def _variances(self, group: dict[str, Any]) -> tuple[float, float]:
        """Those of the prior and of the noise, before a step."""
        moving = sum(math.prod(self.trainable_shape(parameter)) for _, _, parameter in self.trainable())
        prior, noise = (group[name] or moving / 1e6 for name in ("prior_variance", "noise_variance"))
        return prior, group["measured_noise"] or noise
