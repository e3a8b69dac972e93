"""MeZO: zeroth-order SGD along dense random directions."""

from collections.abc import Iterable
from typing import Any

from zolightning.checks import require_fraction
from zolightning.optim.common import DenseSettings, Unpack
from zolightning.optim.dense import StandardDescent
from zolightning.optim.normalization import RUNNING_MEAN, normalized, require_normalization


class MeZO(StandardDescent):
    """MeZO (Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", arXiv 2305.17333, algorithm 1).

    Each step evaluates one batch at ``W + eps z`` and ``W - eps z`` and moves the weights by ``-lr * g * z``, where
    the *projected gradient* g is the difference of the losses over ``2 eps``. The direction z is regenerated from its
    seed and never stored.

    Memory beyond inference: the weights of one layer as scratch; for exact updates of half-precision weights 2 bytes
    per bf16 parameter or 4 per fp16 one (none with ``update_precision="native"``); 4 bytes per parameter for momentum.

    Differs from the released code: weights are never perturbed in place, where restoring half-precision weights makes
    them drift; and weight decay is decoupled and applies to matrices, whatever their names.

    Args:
        params: parameters or parameter groups.
        lr: step size; the weights move by ``lr * projected_grad`` along a unit-variance direction.
        eps: perturbation scale: standard deviation of the perturbation of each weight.
        momentum: decay of an exponential mean of the estimated gradients, ``m = momentum * m + (1 - momentum) * g``;
            0 keeps no state.
        weight_decay: decoupled: ``W -= lr * weight_decay * W`` for parameters of two dimensions or more.
        normalize: divide projected gradients by their running RMS, one number where Adam keeps a tensor (MEAZO,
            arXiv 2605.03869). The RMS move of a weight in a step is then ``lr / sqrt(num_queries)``.
        clip: bound projected gradients at this multiple, above 1, of the running RMS of the clipped ones of earlier
            steps.
        rms_decay: decay of the running mean of squared projected gradients, for `normalize` and `clip`.
        **common: num_queries, align_queries, estimator, noise, seed, update_precision: see
            :class:`~zolightning.optim.base.ZerothOrderOptimizer`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        eps: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        normalize: bool = False,
        clip: float | None = None,
        rms_decay: float = 0.99,
        **common: Unpack[DenseSettings],
    ) -> None:
        descent = {"lr": lr, "eps": eps, "momentum": momentum, "weight_decay": weight_decay}
        normalization = {"normalize": normalize, "clip": clip, "rms_decay": rms_decay}
        super().__init__(params, descent | normalization | RUNNING_MEAN, **common)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        require_fraction("momentum", group["momentum"])
        require_normalization(group)

    def transform_grads(self, group: dict[str, Any], projected_grads: tuple[float, ...]) -> tuple[float, ...]:
        return normalized(group, projected_grads)
