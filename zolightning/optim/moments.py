"""Running moments of an estimated gradient, kept in fp32 (4 bytes per element each).

The gradient comes as a :class:`~zolightning.directions.dense.Direction`: it is generated where it is needed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zolightning import kernels
from zolightning.directions.dense import Direction, accumulate_each, compute_dtype
from zolightning.kernels.adam import AdamStep, adam_step
from zolightning.optim.precision import State, UpdatePrecision, stored_each

_DENOMINATOR_EPS = 1e-8  # Adam's epsilon, where a method has no setting for it


def keeps_moments(group: Mapping[str, Any]) -> bool:
    """Whether the method's settings for a group of parameters ask for a momentum, or for Adam's moments."""
    return bool(group.get("momentum") or group.get("betas"))


def descend(
    weights: Sequence[Tensor],
    states: Sequence[State],
    gradients: Sequence[Direction],
    group: Mapping[str, Any],
    lr: float,
    precision: UpdatePrecision,
) -> None:
    """Moves weights against their estimated gradients: with Adam, with momentum, or with a plain SGD step.

    Args:
        weights: contiguous tensors of any shape.
        states: their entries in the optimizer's state.
        gradients: the estimates, already scaled where that saves a pass over memory: by ``1 - momentum`` for a step
            with momentum, by ``-lr`` for a plain one.
        group: the settings. With ``betas`` the step is Adam's (``denominator_eps`` is its epsilon); otherwise,
            with a ``momentum`` above 0, it is one with momentum. ``weight_decay``, if any, is decoupled and
            shrinks matrices only.
        lr: learning rate of this step.
        precision: how sums are rounded.
    """
    calls = stored_each(weights, states, precision, 1 - lr * group.get("weight_decay", 0.0))
    if group.get("betas"):
        step_of: dict[int, AdamStep] = {}  # by step number: parameters in blocks have counts of their own
        for call, weight, state, gradient in zip(calls, weights, states, gradients, strict=True):
            state["step"] = count = state.get("step", 0) + 1
            if count not in step_of:
                step_of[count] = adam_step(group["betas"], count, group.get("denominator_eps", _DENOMINATOR_EPS), -lr)
            mean, square = moment(state, "exp_avg", weight), moment(state, "exp_avg_sq", weight)
            call |= {**gradient.arguments(), "mean": mean, "square": square, "step": step_of[count]}
        kernels.for_each(kernels.add_adam, calls)
    elif group.get("momentum"):
        means = _momentum(weights, states, gradients, group["momentum"])
        deltas = zip(calls, means, strict=True)
        kernels.for_each(kernels.add_delta, [{**call, "delta": mean, "scale": -lr} for call, mean in deltas])
    else:
        moves = zip(calls, gradients, strict=True)
        kernels.for_each(kernels.add, [{**call, **gradient.arguments()} for call, gradient in moves])


def smoothed(
    cores: Sequence[Tensor], states: Sequence[State], gradients: Sequence[Direction], group: Mapping[str, Any]
) -> Tensor:
    """The gradients of cores after Adam or momentum, as :func:`descend` chooses them, (cores, *core shape).

    The cores, of one shape, dtype and device, do not move. With momentum the gradients are given times
    ``1 - momentum``.
    """
    if group["momentum"]:
        found = torch.stack(_momentum(cores, states, gradients, group["momentum"]))
    else:
        found = torch.zeros(len(cores), cores[0].numel(), dtype=cores[0].dtype, device=cores[0].device)
        descend(found.unbind(), states, gradients, {"betas": group.get("betas")}, -1.0, "exact")
    return found.view(len(cores), *cores[0].shape)


def _momentum(
    weights: Sequence[Tensor], states: Sequence[State], gradients: Sequence[Direction], momentum: float
) -> list[Tensor]:
    """Moves the ``momentum_buffer`` of each state, (n,), towards a gradient, given times ``1 - momentum``."""
    buffers = [moment(state, "momentum_buffer", weight) for weight, state in zip(weights, states, strict=True)]
    accumulate_each(gradients, buffers, momentum)
    return buffers


def moment(state: State, name: str, weight: Tensor) -> Tensor:
    """``state[name]``, (n,), float32 or wider for a weight of n elements; created as zeros if it is not there."""
    if name not in state:
        state[name] = torch.zeros(weight.numel(), dtype=compute_dtype(weight.dtype), device=weight.device)
    return state[name]
