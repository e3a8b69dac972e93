"""Replays recorded steps at other learning rates, as random walks, to measure how much they raise the loss."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_map_only

from zolightning.evaluation.losses import loss_and_terms
from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.moments import keeps_moments
from zolightning.optim.record import StepRecord
from zolightning.optim.subspace import SubspaceOptimizer
from zolightning.scopes.calibration import calibration_forward

_FEW = 4  # walks that find the order of magnitude of the scale
_ROUNDS = 12  # scales that are tried
_FARTHER = 10.0  # largest factor from one scale to the next
_NEAR = 2.0  # a scale within this factor of the one looked for is good enough


@dataclass(frozen=True)
class FoundScale:
    """The learning rate at which walks raise the loss by a given share of itself."""

    scale: float  # multiple of the method's learning rates
    share: float  # the rise that was looked for, as a share of the loss
    loss: float  # before the walks
    rise: float  # that was measured, near the one looked for
    error: float  # standard error of `rise`


def find_scale(rises: Callable[[float, int], Tensor], num_walks: int, loss: float, share: float) -> FoundScale | None:
    """Finds the scale of learning rates at which walks raise the loss by a share of itself, on average.

    The rise is about proportional to the square of the distance. A few walks find the right magnitude, and all of them
    the result; None if the loss does not rise so much within a factor of 10^11, or is not finite. `rises` takes a scale
    and a number of walks, and returns the rise of the loss after each of them, (walks,).
    """
    if not math.isfinite(loss):
        return None
    scale, count, wanted = 1.0, min(_FEW, num_walks), share * abs(loss)
    for _ in range(_ROUNDS):
        found = rises(scale, count)
        rise, error = found.mean().item(), found.std().item() / math.sqrt(count) if count > 1 else 0.0
        factor = math.sqrt(wanted / max(rise, wanted / _FARTHER**2)) if math.isfinite(rise) and wanted else 0.0
        scale *= max(factor, 1 / _FARTHER)
        if 1 / _NEAR <= factor <= _NEAR and count == num_walks:
            return FoundScale(scale, share, loss, rise, error)
        if 1 / _NEAR <= factor <= _NEAR:
            count = num_walks
    return None


class WeightsAndState:
    """A copy, in host memory, of the weights that train and of a method's state, to restore them from."""

    def __init__(self, optimizer: ZerothOrderOptimizer) -> None:
        self._optimizer = optimizer
        self._weights = {parameter: _to_host(parameter) for _, _, parameter in optimizer.trainable()}
        self._state = tree_map_only(Tensor, _to_host, optimizer.state_dict())

    @torch.no_grad()
    def put_back(self) -> None:
        """Restores the method and its parameters, to the bit; may be called again."""
        self._optimizer.load_state_dict(self._state)
        for parameter, values in self._weights.items():
            parameter.copy_(values)


class ReplayedWalks:
    """Random walks from the present weights that consist of recorded steps at other learning rates.

    A walk takes all the recorded steps with random signs, so that they do not descend. For dense methods without
    momentum each step is a walk by itself, which is cheaper: one dense direction raises the loss much like another or
    a sum of several, while low-rank directions differ widely, and with momentum a step carries over into the next ones.
    Steps in an earlier subspace or block are left out.

    The loss is that of the module's ``training_step``; walks share the batches: each walk takes the next one, or
    several where there are more batches than walks. Batches whose loss is not finite are left out.

    Attributes:
        lr: the learning rate of each parameter group at a scale of 1.
        length: the number of steps in a walk.
        forwards: the number of batches evaluated so far.
    """

    def __init__(
        self,
        module: L.LightningModule,
        optimizer: ZerothOrderOptimizer,
        records: Sequence[StepRecord],
        batches: Sequence[Any],
    ) -> None:
        last, groups = records[-1], optimizer.param_groups
        usable = [record for record in records if (record.refresh, record.blocks) == (last.refresh, last.blocks)]
        has_momentum = any(map(keeps_moments, groups))
        is_single = not has_momentum and not isinstance(optimizer, SubspaceOptimizer)
        self._walks = [[record] for record in usable] if is_single else _signed(usable, last.seed)
        self.length = len(self._walks[0])
        self.lr = [group.get("initial_lr", group["lr"]) * groups[0].get("block_weight", 1.0) for group in groups]
        self._module, self._optimizer, self._precision = module, optimizer, module.trainer.precision_plugin
        self._batches = [self._precision.convert_input(batch) for batch in batches]
        self._start = WeightsAndState(optimizer)
        self.forwards = 0
        before = self._losses_after([], 0.0, range(len(self._batches)))
        self._batches = [self._batches[place] for place in before.isfinite().nonzero()]
        self._before = before[before.isfinite()]

    def __len__(self) -> int:
        return len(self._walks)

    @property
    def loss(self) -> float:
        """The mean loss of the batches at the present weights; NaN if none has a finite one."""
        return self._before.mean().item()

    def rises(self, scale: float, count: int) -> Tensor:
        """The rise of the loss, (count,), after each of the first `count` walks, averaged with its opposite's."""
        found = []
        for number, walk in enumerate(self._walks[:count]):
            places = range(number % len(self._batches), len(self._batches), len(self._walks))
            both = [self._losses_after(walk, sign * scale, places) for sign in (1, -1)]
            found.append(((both[0] + both[1]) / 2 - self._before[list(places)]).mean())
        return torch.stack(found)

    @torch.no_grad()
    def _losses_after(self, walk: Sequence[StepRecord], scale: float, places: range) -> Tensor:
        """The losses of some batches, float64, at the end of a walk at `scale` times the method's learning rates."""
        optimizer, lr = self._optimizer, tuple(scale * lr for lr in self.lr)
        self.forwards += len(places)
        try:
            for record in walk:
                optimizer.apply(replace(record, lr=lr))
            optimizer.fold()
            return torch.stack([self._loss(self._batches[place]) for place in places])
        finally:
            self._start.put_back()

    def _loss(self, batch: Any) -> Tensor:
        with isolate_rng(), self._precision.train_step_context():  # the same random numbers each time
            loss, _ = loss_and_terms(calibration_forward(self._module, batch))
        return loss.double().cpu()


def _signed(records: Sequence[StepRecord], seed: int) -> list[list[StepRecord]]:
    """A few walks that consist of all these steps, with random signs."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    signs = (2 * torch.randint(2, (2 * _FEW, len(records)), generator=generator) - 1).tolist()
    return [
        [
            replace(record, projected_grads=tuple(sign * grad for grad in record.projected_grads))
            for record, sign in zip(records, row, strict=True)
        ]
        for row in signs
    ]


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
