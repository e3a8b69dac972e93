"""Running moments of an estimated gradient, kept in fp32 (4 bytes an element each).

The gradient comes as a :class:`~zolightning.directions.dense.Direction`, which adds itself to a tensor: it is generated
where it is needed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zolightning.directions.dense import Direction, accumulate_each, arithmetic
from zolightning.kernels.compiled import chunk_size, chunks
from zolightning.optim.precision import State

CHUNK = 2**20


def momentum_(
    states: Sequence[State], weights: Sequence[Tensor], gradients: Sequence[Direction], momentum: float
) -> list[Tensor]:
    """Moves ``state["momentum_buffer"]`` of each parameter towards its gradient.

    Args:
        states: entries in the optimizer's state; the buffers are made there, of zeros, if needed.
        weights: what the gradients are of, n elements each in any shape.
        gradients: already times ``1 - momentum``.
        momentum: decay of the mean.

    Returns:
        The buffers, (n,) each, float32 or wider.
    """
    buffers = [_moment(state, "momentum_buffer", weight) for state, weight in zip(states, weights, strict=True)]
    accumulate_each(gradients, buffers, momentum)
    return buffers


def adam_(
    state: State, weight: Tensor, gradient: Direction, betas: tuple[float, float], denominator_eps: float
) -> Tensor:
    """One step of Adam's moments (Kingma and Ba, arXiv 1412.6980, algorithm 1).

    Args:
        state: the parameter's entry in the optimizer's state; ``exp_avg`` and ``exp_avg_sq``, (n,), are made there, of
            zeros, if needed, and ``step`` counts.
        weight: what the gradient is of, n elements in any shape.
        gradient: as it is estimated.
        betas: decays of the first and second moment.
        denominator_eps: added to the root of the second moment.

    Returns:
        The step per learning rate, (n,), float32 or wider: a new tensor.
    """
    mean, square = _moment(state, "exp_avg", weight), _moment(state, "exp_avg_sq", weight)
    state["step"] = state.get("step", 0) + 1
    mean_correction, square_correction = (1 - beta ** state["step"] for beta in betas)
    step = torch.zeros_like(mean)
    gradient.accumulate(step)
    for part in chunks(weight.numel(), max(CHUNK, chunk_size(weight))):
        mean[part].lerp_(step[part], 1 - betas[0])
        square[part].mul_(betas[1]).addcmul_(step[part], step[part], value=1 - betas[1])
        denominator = (square[part] / square_correction).sqrt_().add_(denominator_eps)
        torch.div(mean[part] / mean_correction, denominator, out=step[part])
    return step


def _moment(state: State, name: str, weight: Tensor) -> Tensor:
    if name not in state:
        state[name] = torch.zeros(weight.numel(), dtype=arithmetic(weight.dtype), device=weight.device)
    return state[name]
