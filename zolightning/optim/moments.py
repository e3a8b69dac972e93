"""Running moments of an estimated gradient, kept in fp32 (4 bytes an element each).

The gradient comes as a :class:`~zolightning.directions.dense.Direction`: it is generated where it is needed.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zolightning.directions.dense import Direction, accumulate_each, compute_dtype
from zolightning.kernels.adam import adam_step
from zolightning.optim.precision import State, UpdatePrecision, add_adam, add_directions, add_tensors

_DENOMINATOR_EPS = 1e-8  # Adam's epsilon, where a method has no setting for it


def descend(
    weights: Sequence[Tensor],
    states: Sequence[State],
    gradients: Sequence[Direction],
    group: dict[str, Any],
    lr: float,
    precision: UpdatePrecision,
) -> None:
    """Moves weights against their estimated gradients: by Adam, with momentum, or by a plain step of SGD.

    Args:
        weights: contiguous tensors of any shape.
        states: their entries in the optimizer's state.
        gradients: the estimates, already scaled where that saves a pass over memory: by ``1 - momentum`` for a step
            with momentum, by ``-lr`` for a plain one.
        group: the settings. With ``betas`` the step is Adam's (``denominator_eps`` is its epsilon), else with a
            ``momentum`` above 0 one with momentum. ``weight_decay``, if any, is decoupled and shrinks matrices only.
        lr: learning rate of this step.
        precision: how sums are rounded.
    """
    decay = 1 - lr * group.get("weight_decay", 0.0)
    decays = [decay if weight.ndim >= 2 else 1.0 for weight in weights]
    if group.get("betas"):
        denominator_eps = group.get("denominator_eps", _DENOMINATOR_EPS)
        adam_(states, weights, gradients, group["betas"], denominator_eps, -lr, precision, decays)
    elif group.get("momentum"):
        means = momentum_(states, weights, gradients, group["momentum"])
        add_tensors(weights, states, means, precision, decays, -lr)
    else:
        add_directions(weights, states, gradients, precision, decays)


def smoothed(
    cores: Sequence[Tensor], states: Sequence[State], gradients: Sequence[Direction], group: dict[str, Any]
) -> list[Tensor]:
    """The gradients of cores after Adam or momentum, as :func:`descend` chooses them, in the shapes of the cores.

    Args:
        cores: tensors of one dtype and device; they are not changed.
        states: their entries in the optimizer's state.
        gradients: the estimates, times ``1 - momentum`` where there is momentum.
        group: the settings, as for :func:`descend`.
    """
    if group["momentum"] and not group["betas"]:
        found = momentum_(states, cores, gradients, group["momentum"])
    else:
        sizes = [core.numel() for core in cores]
        zeros = torch.zeros(sum(sizes), dtype=cores[0].dtype, device=cores[0].device)
        found = list(zeros.split(sizes))
        if group["betas"]:
            adam_(states, found, gradients, group["betas"], _DENOMINATOR_EPS, 1.0, "exact", [1.0] * len(found))
        else:
            accumulate_each(gradients, found)
    return [gradient.view(core.shape) for gradient, core in zip(found, cores, strict=True)]


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
    buffers = [moment(state, "momentum_buffer", weight) for state, weight in zip(states, weights, strict=True)]
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
        gradients: the estimated gradients.
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
            (moment(state, "exp_avg", weight), moment(state, "exp_avg_sq", weight))
            for state, weight in zip(own, moved, strict=True)
        ]
        step = adam_step(betas, count, denominator_eps, scale)
        add_adam(moved, own, moments, directions, step, precision, [decays[place] for place in places])


def moment(state: State, name: str, weight: Tensor) -> Tensor:
    """``state[name]``, (n,), float32 or wider for a weight of n elements; made of zeros if it is not there."""
    if name not in state:
        state[name] = torch.zeros(weight.numel(), dtype=compute_dtype(weight.dtype), device=weight.device)
    return state[name]
