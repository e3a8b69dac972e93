"""What the loss would be where recorded steps lead at other learning rates, and how far they may lead."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_map_only

from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.checks import loss_and_terms
from zolightning.optim.record import StepRecord
from zolightning.optim.subspace import SubspaceOptimizer
from zolightning.scopes.calibration import calibration_forward

_FEW = 4  # walks that lead near
_ROUNDS = 12  # distances that are tried
_FARTHER = 10.0  # at most from one to the next
_NEAR = 2.0  # a distance within this factor of the one that was found is near


@dataclass(frozen=True)
class Found:
    """How far steps may go.

    Attributes:
        scale: multiple of the method's learning rates at which walks make the loss rise by the share.
        share: of the loss.
        loss: before.
        rise: measured near there.
        error: standard error of `rise`.
    """

    scale: float
    share: float
    loss: float
    rise: float
    error: float


def find_scale(rises: Callable[[float, int], Tensor], num_walks: int, loss: float, share: float) -> Found | None:
    """Finds how far to walk until the loss rises by a share of itself, on average over walks.

    A rise goes with the square of the distance, so that a few walks soon lead near, where all of them are taken.

    Args:
        rises: (walks,), of the loss after walks of a distance; so many of them.
        num_walks: how many there are.
        loss: before.
        share: of it.

    Returns:
        None if it does not rise so much within a factor of 10^11.
    """
    scale, count, wanted = 1.0, min(_FEW, num_walks), share * abs(loss)
    for _ in range(_ROUNDS):
        found = rises(scale, count)
        rise, error = found.mean().item(), found.std().item() / math.sqrt(count) if count > 1 else 0.0
        factor = math.sqrt(wanted / max(rise, wanted / _FARTHER**2)) if math.isfinite(rise) and wanted else 0.0
        scale *= max(factor, 1 / _FARTHER)
        if 1 / _NEAR <= factor <= _NEAR and count == num_walks:
            return Found(scale, share, loss, rise, error)
        if 1 / _NEAR <= factor <= _NEAR:
            count = num_walks
    return None


class WeightsAndState:
    """What trains and the state of a method, as they are now: a copy in host memory, to be put back.

    Args:
        optimizer: the method.
    """

    def __init__(self, optimizer: ZerothOrderOptimizer) -> None:
        self._optimizer = optimizer
        self._weights = {parameter: _to_host(parameter) for _, _, parameter in optimizer.trainable()}
        self._state = tree_map_only(Tensor, _to_host, optimizer.state_dict())

    @torch.no_grad()
    def put_back(self) -> None:
        """Has the method and its parameters be as they were, to the bit; as often as it is called."""
        self._optimizer.load_state_dict(self._state)
        for parameter, values in self._weights.items():
            parameter.copy_(values)


class ReplayedWalks:
    """Where recorded steps would lead from the present weights, at other learning rates.

    A walk has all steps, with random signs, so that no descent is among them. Of a dense method without momentum each
    step is a walk of its own, which costs less: one dense direction is much like another, and like a sum of them, while
    those of low rank differ widely, and with momentum a step goes on in the next ones.
    Steps of an earlier subspace or block do not count: what they measured is along no direction of the present ones.

    Args:
        module: whose ``training_step`` gives the loss.
        optimizer: whose steps they were.
        records: of the steps.
        batches: to evaluate the loss of: for each walk the next one.

    Attributes:
        lr: of each group of the method, on which distances are based.
        length: steps of each walk.
        forwards: evaluated batches.
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
        has_momentum = any(group.get("momentum") or group.get("betas") for group in groups)
        is_single = not has_momentum and not isinstance(optimizer, SubspaceOptimizer)
        self._walks = [[record] for record in usable] if is_single else _signed(usable, last.seed)
        self.length = len(self._walks[0])
        self.lr = [group.get("initial_lr", group["lr"]) * groups[0].get("block_weight", 1.0) for group in groups]
        self._module, self._optimizer, self._precision = module, optimizer, module.trainer.precision_plugin
        self._batches = [self._precision.convert_input(batch) for batch in batches]
        self._start = WeightsAndState(optimizer)
        self.forwards = 0
        self._before = torch.stack([self._loss_after([], 0.0, batch) for batch in self._batches])

    def __len__(self) -> int:
        return len(self._walks)

    @property
    def loss(self) -> float:
        """At the present weights, the mean over batches."""
        return self._before.mean().item()

    def rises(self, scale: float, count: int) -> Tensor:
        """By how much the loss rises on the first `count` walks, (count,): the mean of each and its opposite."""
        found = []
        for number, walk in enumerate(self._walks[:count]):
            place = number % len(self._batches)
            both = [self._loss_after(walk, sign * scale, self._batches[place]) for sign in (1, -1)]
            found.append((both[0] + both[1]) / 2 - self._before[place])
        return torch.stack(found)

    @torch.no_grad()
    def _loss_after(self, walk: Sequence[StepRecord], scale: float, batch: Any) -> Tensor:
        """The loss of a batch, float64, where a walk at `scale` times the method's learning rates ends."""
        optimizer, lr = self._optimizer, tuple(scale * lr for lr in self.lr)
        self.forwards += 1
        try:
            for record in walk:
                optimizer.apply(replace(record, lr=lr))
            optimizer.fold()
            with isolate_rng(), self._precision.train_step_context():  # the same random numbers each time
                loss, _ = loss_and_terms(calibration_forward(self._module, batch))
            return loss.double().cpu()
        finally:
            self._start.put_back()


def _signed(records: Sequence[StepRecord], seed: int) -> list[list[StepRecord]]:
    """A few walks of all these steps, each step forwards or backwards by a draw."""
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
