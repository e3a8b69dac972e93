"""ZO-AdaMM: AMSGrad on the zeroth-order gradient estimate."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zolightning.directions.dense import Direction
from zolightning.kernels.compiled import chunk_size, chunks
from zolightning.optim.mezo_adam import MeZOAdam
from zolightning.optim.moments import moment
from zolightning.optim.precision import State, add_tensor

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")  # torch.optim's names


class ZOAdaMM(MeZOAdam):
    """ZO-AdaMM (arXiv 1910.06513, NeurIPS 2019): AMSGrad on the estimate ``g z``, whose second moment never falls.

    It is the paper's algorithm 1 without constraints:
    ``m = beta1 m + (1 - beta1) g z``, ``v = beta2 v + (1 - beta2) (g z)^2``, ``h = max(h, v)``, and the weight moves by
    ``-lr m / (sqrt(h) + denominator_eps)``. As in the paper, and unlike in Adam, the moments start at 0 without
    bias correction: the first steps are longer, up to ``(1 - beta1) / sqrt(1 - beta2)`` times `lr`, 3.2 times by
    default. One projected gradient that is far too large makes all later steps short.

    Memory: 12 bytes per parameter for m, v and h; a single layer (``DominantLayer``) keeps it small.

    Args: those of :class:`~zolightning.optim.MeZOAdam`.
    """

    def update_parameters(
        self,
        weights: Sequence[Tensor],
        states: Sequence[State],
        gradients: Sequence[Direction],
        group: dict[str, Any],
        lr: float,
    ) -> None:
        (beta1, beta2), shrink = group["betas"], 1 - lr * group["weight_decay"]
        for weight, state, direction in zip(weights, states, gradients, strict=True):
            decay, flat = shrink if weight.ndim >= 2 else 1.0, weight.view(-1)
            mean, square, largest = (moment(state, name, weight) for name in _MOMENTS)
            for part in chunks(weight.numel(), chunk_size(weight)):
                # Separate sums and products: fused ones, as in `addcmul_`, would round differently on a GPU than on a
                # CPU.
                gradient = direction.of_elements(flat[part], part.start)
                m = mean[part].mul_(beta1).add_(gradient * (1 - beta1))
                v = square[part].mul_(beta2).add_(gradient.square() * (1 - beta2))
                h = torch.maximum(largest[part], v, out=largest[part])
                step = m / (h.sqrt() + group["denominator_eps"])
                add_tensor(weight, state, step, self.update_precision, decay, part.start, -lr)
