"""Normalizes and clips projected gradients by their running RMS: one number where Adam keeps a tensor."""

import math
from typing import Any

from zolightning.checks import require_fraction, require_positive

RUNNING_MEAN = {"mean_square": 0.0, "mean_square_weight": 0.0}  # entries of a parameter group, before the first step


def require_normalization(group: dict[str, Any]) -> None:
    """Raises a ValueError that names `rms_decay` or `clip`, its value and what is accepted."""
    require_fraction("rms_decay", group["rms_decay"])
    if (clip := group["clip"]) is not None:
        require_positive("clip", clip)
        if clip <= 1:
            raise ValueError(
                f"`clip` must be above 1, got {clip!r}: the RMS is that of clipped gradients, and would fall to 0."
            )


def normalized(group: dict[str, Any], projected_grads: tuple[float, ...]) -> tuple[float, ...]:
    """Clips projected gradients at a multiple of their running RMS, and divides them by it (MEAZO, arXiv 2605.03869).

    Squares are those of clipped gradients. Each step's mean over the queries enters the running one with weight
    ``1 - rms_decay``, which is divided by the sum of its weights, like Adam's moments. Gradients are clipped by the RMS
    of the steps before, and divided by the one that includes theirs. Nothing is clipped before the first gradient that
    is not 0.

    Args:
        group: a parameter group, whose ``normalize`` and ``clip`` say which of the two is done, with ``rms_decay`` and
            the entries of :data:`RUNNING_MEAN`, which are updated.
        projected_grads: those of a step, one for each query.
    """
    if not group["normalize"] and group["clip"] is None:
        return projected_grads
    decay, weight = group["rms_decay"], group["mean_square_weight"]
    if group["clip"] is not None and group["mean_square"] > 0:
        bound = group["clip"] * math.sqrt(group["mean_square"] / weight)
        projected_grads = tuple(max(-bound, min(bound, g)) for g in projected_grads)
    mean_square = sum(g * g for g in projected_grads) / len(projected_grads)
    group["mean_square"] = decay * group["mean_square"] + (1 - decay) * mean_square
    group["mean_square_weight"] = decay * weight + (1 - decay)
    if not group["normalize"]:
        return projected_grads
    rms = math.sqrt(group["mean_square"] / group["mean_square_weight"])
    return tuple(g / rms if rms else 0.0 for g in projected_grads)
