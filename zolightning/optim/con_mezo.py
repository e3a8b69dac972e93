"""ConMeZO: directions in a cone around the momentum."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.directions.cone import ConeDirection
from zolightning.directions.dense import Direction, compute_dtype
from zolightning.kernels.compiled import chunk_size, chunks
from zolightning.optim.common import DenseSettings, Unpack
from zolightning.optim.mezo import MeZO
from zolightning.optim.moments import moment
from zolightning.optim.precision import State, add_tensor
from zolightning.optim.record import StepRecord


class ConMeZO(MeZO):
    """ConMeZO (Behric et al., arXiv 2511.02757, AISTATS 2026): MeZO along directions in a cone around the momentum.

    With z Gaussian, m the momentum, d the number of weights that move and t the `angle`, directions are
    ``z' = sin(t) z + cos(t) sqrt(d) m / |m|``, with one norm over all weights together. The weights move by
    ``-lr * g * z'``, and ``m = momentum * m + (1 - momentum) * g z'``. While there is no momentum, z' is z.
    At an angle of pi / 2 it is MeZO.

    Memory: 4 bytes per parameter for m, besides what :class:`~zolightning.optim.MeZO` needs.

    Differs from the released code (LejsDeen/ConMeZO): m is float32 whatever the weights are; `momentum` is constant,
    whereas the paper's runs raise it from 0.1 over their first tenth.

    Args:
        params: parameters or parameter groups.
        lr: step size; the weights move by ``lr * projected_grad`` along a direction.
        eps: perturbation scale: root mean square of the perturbation of a weight.
        momentum: decay of the mean of the estimated gradients; 0.95 and 0.99 in the paper.
        angle: half the angle at the tip of the cone, in radians, above 0 and at most pi / 2; 1.35 to 1.4 in the paper.
        weight_decay, normalize, clip, rms_decay: as in :class:`~zolightning.optim.MeZO`.
        **common: num_queries, align_queries, estimator, noise, seed, update_precision: see
            :class:`~zolightning.optim.base.ZerothOrderOptimizer`.
    """

    takes_shards = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        eps: float = 1e-3,
        momentum: float = 0.95,
        angle: float = 1.35,
        weight_decay: float = 0.0,
        normalize: bool = False,
        clip: float | None = None,
        rms_decay: float = 0.99,
        **common: Unpack[DenseSettings],
    ) -> None:
        if not 0 < angle <= math.pi / 2:
            raise ValueError(f"`angle` must be above 0 and at most pi / 2, got {angle!r}.")
        self.angle = angle
        super().__init__(params, lr, eps, momentum, weight_decay, normalize, clip, rms_decay, **common)

    def directions_of(
        self, named: Mapping[nn.Parameter, str], seed: int, step: int, coefficients: Mapping[int, float]
    ) -> Iterable[Direction]:
        length = self._inverse_length()
        if length is None:
            return super().directions_of(named, seed, step, coefficients)
        leaning = {query: math.sin(self.angle) * value for query, value in coefficients.items()}
        along = math.cos(self.angle) * sum(coefficients.values()) * length
        found: list[Direction] = []
        for parameter, direction in zip(named, super().directions_of(named, seed, step, leaning), strict=True):
            axis = self.state.get(parameter, {}).get("momentum_buffer")  # an estimate creates no state
            scale = along.to(parameter.device, compute_dtype(parameter.dtype))
            found.append(direction if axis is None else ConeDirection(direction, axis, scale))
        return found

    def gradient_scale(self, group: dict[str, Any], lr: float) -> float:
        return 1.0

    def update_parameters(
        self,
        weights: Sequence[Tensor],
        states: Sequence[State],
        gradients: Sequence[Direction],
        group: dict[str, Any],
        lr: float,
    ) -> None:
        keep, shrink = group["momentum"], 1 - lr * group["weight_decay"]
        for weight, state, direction in zip(weights, states, gradients, strict=True):
            decay, flat = shrink if weight.ndim >= 2 else 1.0, weight.view(-1)
            mean = moment(state, "momentum_buffer", weight)
            for part in chunks(weight.numel(), chunk_size(weight)):
                gradient = direction.of_elements(flat[part], part.start)
                add_tensor(weight, state, gradient, self.update_precision, decay, part.start, -lr)
                mean[part].mul_(keep).add_(gradient.mul_(1 - keep))

    def update(self, record: StepRecord) -> None:
        super().update(record)
        # Only after all weights have moved: they must move along the directions that were evaluated.
        for _, _, parameter in self.trainable():
            mean = self.state[parameter]["momentum_buffer"]
            parts = [mean[part].double().square().sum() for part in chunks(mean.numel(), chunk_size(mean))]
            self.state[parameter]["squared_norm"] = torch.stack(parts).sum().to(mean.dtype)

    def _inverse_length(self) -> Tensor | None:
        """``sqrt(d) / |m|``, float64; 0 if m is zero, and None if there is no momentum."""
        squares: dict[str, Tensor] = {}
        count = 0
        for _, name, parameter in self.trainable():
            count += math.prod(self.trainable_shape(parameter))
            if "squared_norm" in (state := self.state.get(parameter, {})):
                squares[name] = state["squared_norm"]
        if not squares:
            return None
        in_order = [squares[name] for name in sorted(squares)]  # so the sum does not depend on the order of parameters
        total = torch.stack([square.to(in_order[0].device, torch.float64) for square in in_order]).sum()
        return torch.where(total > 0, (count / total).sqrt(), 0.0)
