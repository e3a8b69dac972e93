"""Estimates the squared gradient and the curvature of blocks of parameters by forward passes."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zolightning.evaluation.losses import LossFunction
from zolightning.optim import MeZO
from zolightning.optim.estimators import ThreePoint
from zolightning.scopes.parts import ChosenParameters
from zolightning.scopes.scope import trainable_as


@dataclass(frozen=True)
class BlockSignal:
    """Estimates for one block with gradient g and Hessian H; they are unbiased and may be negative."""

    name: str
    size: int  # elements that would train
    squared_grad: float  # ``|g|^2``
    squared_grad_error: float  # its standard error
    curvature: float  # ``tr H``
    curvature_error: float  # its standard error
    least_curvature: float  # twice the median standard error of all blocks, so that noise is not taken for flatness

    @property
    def ratio(self) -> float:
        """``|g|^2 / tr H``: twice the decrease of the loss by a step ``-lr g z`` at the best rate, ``1 / tr H``."""
        curvature = max(self.curvature, self.least_curvature)
        return self.squared_grad / curvature if curvature > 0 else 0.0


def measure_signal(
    module: nn.Module,
    blocks: Mapping[str, ChosenParameters],
    losses: Sequence[LossFunction],
    num_queries: int,
    eps: float = 1e-3,
    seed: int | None = None,
) -> list[BlockSignal]:
    """Perturbs one block after the other along `num_queries` directions each.

    Along a direction z, each of B batches has a projected gradient ``z' g_i``. The square of their mean is biased by
    the noise of the batches. The mean of the products ``(z' g_i)(z' g_j)`` over pairs of different batches is not: its
    expectation is ``|g|^2``. The expectation of second differences over ``eps**2`` is ``tr H``.

    Costs ``B (2 num_queries + 1)`` evaluations per block, and a few that find where parameters are read. Evaluate in
    float32 if possible: in half precision a perturbation also changes the rounding in the forward pass.

    No parameter is in two blocks, and the batches of the losses, two at least, have no common examples. The spread over
    directions, two at least, gives the errors. `eps` is the standard deviation of the perturbation of each weight; a
    `seed` None is that of ``seed_everything``.

    Raises:
        ValueError: if there are fewer than two batches.
        NonFiniteLossError: if a loss is not finite.
    """
    if len(losses) < 2:
        raise ValueError(f"It takes at least two batches to tell a signal from noise, got {len(losses)}.")
    chosen = {parameter: part for block in blocks.values() for parameter, part in block.items()}
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter in chosen]
    found: list[tuple[str, int, Tensor, Tensor]] = []
    with trainable_as(dict.fromkeys(chosen, True)):
        estimator = ThreePoint()
        optimizer = MeZO(named, eps=eps, seed=seed, num_queries=num_queries, estimator=estimator)
        optimizer.attach(module)
        try:
            optimizer.restrict({parameter: part for parameter, part in chosen.items() if part is not None})
            optimizer.set_blocks([list(block) for block in blocks.values()])
            for index, (name, block) in enumerate(blocks.items()):
                optimizer.activate([index])
                records = [optimizer.estimate(loss) for loss in losses]
                grads = torch.tensor([record.projected_grads for record in records], dtype=torch.float64)
                bends = [estimator.second_differences(record.losses) for record in records]
                size = sum(math.prod(optimizer.trainable_shape(parameter)) for parameter in block)
                curvatures = torch.tensor(bends, dtype=torch.float64).mean(0) / eps**2
                found.append((name, size, pair_products(grads), curvatures))
        finally:
            optimizer.detach()
    least = 2 * statistics.median(_mean(curvatures)[1] for *_, curvatures in found)
    return [
        BlockSignal(name, size, *_mean(squared), *_mean(curvatures), least) for name, size, squared, curvatures in found
    ]


def pair_products(grads: Tensor) -> Tensor:
    """The mean of the products of entries in two different rows, for each column of a (rows, columns) matrix."""
    count = len(grads)
    return (grads.sum(0).square() - grads.square().sum(0)) / (count * (count - 1))


def table(signals: Iterable[BlockSignal]) -> str:
    """One line a block."""
    lines = ["block                        numbers          |g|^2      (error)           tr H      (error)      ratio"]
    lines += [
        f"{s.name:24} {s.size:11,} {s.squared_grad:14.4g} {s.squared_grad_error:12.2g} {s.curvature:14.4g} "
        f"{s.curvature_error:12.2g} {s.ratio:10.3g}"
        for s in signals
    ]
    return "\n".join(lines)


def _mean(values: Tensor) -> tuple[float, float]:
    """The mean and its standard error."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values))
