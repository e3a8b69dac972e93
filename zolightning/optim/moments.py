"""Running moments of an estimated gradient, kept in fp32 (4 bytes an element each).

The gradient comes as a :class:`~zolightning.directions.dense.Direction`: it is generated where it is needed.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from zolightning.directions.dense import Direction, accumulate_each, arithmetic
from zolightning.kernels.adam import adam_step
from zolightning.optim.precision import State, UpdatePrecision, add_adam


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
    states: Sequence[State],
    weights: Sequence[Tensor],
    gradients: Sequence[Direction],
    betas: tuple[float, float],
    denominator_eps: float,
    scale: float,
    precision: UpdatePrecision,
    decays: Sequence[float],
) -> None:
    """One step of Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1): moves moments and weights in one pass.

    Args:
        states: entries in the optimizer's state; ``exp_avg`` and ``exp_avg_sq``, (n,) each, are made there, of zeros,
            if needed, and ``step`` counts.
        weights: n elements each in any shape, contiguous.
        gradients: as they are estimated.
        betas: decays of the first and second moment.
        denominator_eps: added to the root of the second moment.
        scale: minus the learning rate.
        precision: how sums are rounded.
        decays: multiply the weights first.
    """
    by_count: defaultdict[int, list[int]] = defaultdict(list)  # parameters of blocks have counts of their own
    for place, state in enumerate(states):
        state["step"] = state.get("step", 0) + 1
        by_count[state["step"]].append(place)
    for count, places in by_count.items():
        moved = [weights[place] for place in places]
        own, directions = [states[place] for place in places], [gradients[place] for place in places]
        moments = [
            (_moment(state, "exp_avg", weight), _moment(state, "exp_avg_sq", weight))
            for state, weight in zip(own, moved, strict=True)
        ]
        step = adam_step(betas, count, denominator_eps, scale)
        add_adam(moved, own, moments, directions, step, precision, [decays[place] for place in places])


def _moment(state: State, name: str, weight: Tensor) -> Tensor:
    if name not in state:
        state[name] = torch.zeros(weight.numel(), dtype=arithmetic(weight.dtype), device=weight.device)
    return state[name]
