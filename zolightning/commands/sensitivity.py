"""Measures how much the loss changes when each layer is perturbed, before any training."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zolightning.layers import LayerStack
from zolightning.optim import MeZO
from zolightning.scopes.scope import trainable_as

Evaluate = Callable[[], Tensor]


@dataclass(frozen=True)
class LayerSensitivity:
    """What directions restricted to one layer did to the loss."""

    layer: int  # index of the layer
    rms: float  # root mean square of the two-sided projected gradients, an estimate of the norm of the layer's gradient
    mean_change: float  # mean of ``|L(W + eps z) - L(W)|``


@dataclass(frozen=True)
class Sensitivity:
    """The scan of all layers."""

    loss: float  # the loss of the batch at the stored weights
    eps: float  # standard deviation of the perturbation of each weight
    num_queries: int  # directions for each layer
    dtype: str  # the dtype of the layers
    layers: tuple[LayerSensitivity, ...]  # one entry a layer, in order

    @property
    def relative_error(self) -> float:
        """Standard error of each `rms` over `rms`: projections of a gradient on Gaussian directions are Gaussian."""
        return 1 / math.sqrt(2 * self.num_queries)


@torch.no_grad()
def scan_sensitivity(
    stack: LayerStack,
    evaluate: Evaluate,
    num_queries: int,
    eps: float = 1e-3,
    seed: int | None = None,
) -> Sensitivity:
    """Perturbs one layer after the other along `num_queries` directions: ``2 * num_queries`` forwards a layer.

    There are also one forward of the unperturbed network, and three or four for each layer that show where it is read.

    With directions z of one layer, the root mean square of ``(L(W + eps z) - L(W - eps z)) / (2 eps)`` estimates the
    norm of that layer's gradient, with relative standard error ``1 / sqrt(2 * num_queries)`` (Malladi et al.,
    arXiv 2305.17333, section 4). In half precision a perturbation also changes how the forward pass rounds, which can
    move the loss more than its gradient does: scan in float32.

    Args:
        stack: the layers; their weights are as before afterwards.
        evaluate: the loss of one batch, always the same.
        num_queries: directions a layer.
        eps: standard deviation of the perturbation of each weight.
        seed: seed of the directions; None takes that of ``seed_everything``.
    """
    loss = evaluate().double().item()
    layers = []
    for index in range(len(stack)):
        named = stack.parameters(index)
        with trainable_as(dict.fromkeys(named.values(), True)):
            record = MeZO(named.items(), eps=eps, seed=seed, num_queries=num_queries).estimate(evaluate)
        rms = math.sqrt(sum(g * g for g in record.projected_grads) / num_queries)
        plus = record.losses[::2]  # the losses of a query and its opposite come in turns
        layers.append(LayerSensitivity(index, rms, sum(abs(p - loss) for p in plus) / num_queries))
    dtype = str(next(iter(named.values())).dtype).removeprefix("torch.")
    return Sensitivity(loss, eps, num_queries, dtype, tuple(layers))
