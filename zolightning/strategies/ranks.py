"""The ranks of a run: how they divide a step, what they exchange, and how it is checked that they agree."""

import atexit
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.distributed import ReduceOp

from zolightning.directions.shards import is_sharded
from zolightning.evaluation.nested import tensors_in
from zolightning.optim import ZerothOrderOptimizer
from zolightning.weights_digest import flat_bytes

CHECK_INTERVAL = 100  # steps; reading all weights once takes less than one of them
_MIX = 0x1E3779B97F4A7C15  # any large odd number


class RanksError(RuntimeError):
    """The ranks of a run differ, or one does not respond; the weights are those of the last step."""


@dataclass(frozen=True)
class Layout:
    """Ranks in groups of neighbours: those of a group read the same rows and share the evaluations of a step.

    Args:
        world_size: ranks of the run.
        perturbation_parallel_size: ranks of a group.
    """

    world_size: int
    perturbation_parallel_size: int = 1

    @property
    def data_parallel_size(self) -> int:
        """How many groups there are, which split a batch."""
        return self.world_size // self.perturbation_parallel_size

    def data_rank(self, rank: int) -> int:
        """Which part of a batch a rank reads."""
        return rank // self.perturbation_parallel_size

    def perturbation_rank(self, rank: int) -> int:
        """Which part of a step's evaluations a rank makes."""
        return rank % self.perturbation_parallel_size

    def __str__(self) -> str:
        parts = {"a batch": self.data_parallel_size, "a step's evaluations": self.perturbation_parallel_size}
        split = " x ".join(f"{count} parts of {name}" for name, count in parts.items() if count > 1)
        return f"{self.world_size}: {split or 'one part'}"


def layout_of(trainer: L.Trainer) -> Layout:
    """The layout of the strategy; if it has none, all ranks split the batch."""
    return getattr(trainer.strategy, "layout", None) or Layout(trainer.world_size)


class LossExchange:
    """Adds up the losses of one step over all ranks in one collective, and checks that the ranks agree.

    In the first step of a fit, and every ``check_interval`` steps of the strategy (100 if it has none), the collective
    also carries six numbers per rank that must be equal: the step, the number of batches in an epoch, and checksums of
    the weights with the method's state, and of the batch if ranks share it.

    Args:
        module: the module, whose parameters must be the same on all ranks.
        optimizer: the module's method, before the step.
        layout: how the ranks divide a step.
    """

    def __init__(self, module: L.LightningModule, optimizer: ZerothOrderOptimizer, layout: Layout) -> None:
        self._module = module
        self._optimizer = optimizer
        self._layout = layout
        self._interval: int = getattr(module.trainer.strategy, "check_interval", CHECK_INTERVAL)
        self._step: int = optimizer.param_groups[0]["step"]
        self._is_due = optimizer.record is None or self._step % self._interval == 0

    def __call__(self, totals: Tensor) -> Tensor:
        """The sum of a tensor over all ranks.

        Raises:
            RanksError: if ranks differ, naming the rank and the step; or if one does not respond.
        """
        if not self._is_due:
            return self._sum(totals)
        self._is_due = False
        own = self._facts().to(totals.device)
        table = totals.new_zeros(self._layout.world_size, len(own))
        table[self._module.global_rank] = own
        summed = self._sum(torch.cat([totals.flatten(), table.flatten()]))
        self._compare(summed[totals.numel() :].view_as(table).tolist())
        return summed[: totals.numel()].view_as(totals)

    def _sum(self, tensor: Tensor) -> Tensor:
        with _one_line_errors(self._module.trainer):
            # Losses may come from the CPU, where NCCL cannot add them.
            return self._module.trainer.strategy.reduce(tensor.to(self._module.device), reduce_op="sum")

    def _facts(self) -> Tensor:
        """The numbers (6,) of this rank."""
        trainer, device = self._module.trainer, self._module.device
        batches = float(trainer.num_training_batches)
        if trainer.max_steps > 0:
            batches = min(batches, trainer.max_steps)
        counts = torch.tensor([self._step, -1 if batches == float("inf") else batches], dtype=torch.float64)
        held = (tensor for tensor in _held(self._module, self._optimizer) if tensor.device == device)
        batch = tensors_in(getattr(trainer.strategy, "batch", None))
        rows = (tensor for tensor in batch if tensor.layout == torch.strided)
        return torch.cat([counts.to(device), checksum(held, device), checksum(rows, device)])

    def _compare(self, ranks: list[list[float]]) -> None:
        steps, batches, weights, rows = zip(*((r[0], r[1], tuple(r[2:4]), tuple(r[4:])) for r in ranks), strict=True)
        if (found := _odd_one(steps)) is not None:
            odd, usual = found
            raise RanksError(
                f"Rank {odd} is at step {steps[odd]:.0f} and rank {usual} at step {steps[usual]:.0f}: they have "
                "resumed from different checkpoints."
            )
        if (found := _odd_one(batches)) is not None:
            odd, usual = found
            raise RanksError(
                f"Rank {odd} has {batches[odd]:.0f} batches an epoch and rank {usual} has {batches[usual]:.0f} (-1: "
                "not known), so that they would wait for each other: give every rank the same number, or set "
                "`trainer.limit_train_batches`."
            )
        size = self._layout.perturbation_parallel_size
        for start in range(0, len(rows), size):
            if (found := _odd_one(rows[start : start + size])) is not None:
                odd, usual = (start + rank for rank in found)
                raise RanksError(
                    f"Rank {odd} was given a different batch from rank {usual} at step {self._step}, but they share "
                    f"the evaluations of each batch (`perturbation_parallel_size` is {size}). Leave the sampler to "
                    "Lightning, or split rows as `trainer.distributed_sampler_kwargs` says."
                )
        if (found := _odd_one(weights)) is not None:
            odd, usual = found
            raise RanksError(
                f"The weights of rank {odd} are not those of rank {usual} before step {self._step}, but they were "
                f"{self._interval} steps ago or when the run began: something on one of the two has changed them. "
                "Resume from an earlier checkpoint."
            )


def largest_of_ranks(trainer: L.Trainer, *values: int) -> list[int]:
    """The maximum of each value over all ranks."""
    if trainer.world_size == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.int32, device=trainer.strategy.root_device)
    with _one_line_errors(trainer):
        return trainer.strategy.reduce(tensor, reduce_op="max").tolist()


def of_all_ranks(trainer: L.Trainer, own: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank has, by rank, on the first rank; to be called by all ranks."""
    if trainer.world_size == 1:
        return [own]
    found: list[Any] = [None] * trainer.world_size
    with _one_line_errors(trainer):
        torch.distributed.gather_object(move_data_to_device(own, "cpu"), found if trainer.is_global_zero else None)
    return found


@contextmanager
def _one_line_errors(trainer: L.Trainer) -> Iterator[None]:
    """A context that turns torch's errors in a collective into one line.

    Raises:
        RanksError: where torch raises a RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        raise RanksError(
            f"Rank {trainer.global_rank} waited in vain for the other ranks after step {trainer.global_step}: one of "
            f"them has ended or hangs ({_reason(error)}). Resume from the last checkpoint, on any number of ranks."
        ) from error


def lost_rank(error: BaseException) -> str | None:
    """What to tell the user of an error that torch's backends raise in any collective when a rank is gone, or None."""
    if isinstance(error, torch.distributed.DistBackendError) or "/gloo/transport/" in str(error):
        return (
            f"A rank waited in vain for the others: one of them has ended or hangs ({_reason(error)}). A fit can be "
            "resumed from its last step, on any number of ranks."
        )
    return None


def _reason(error: BaseException) -> str:
    return re.sub(r"^\[\S+\] ", "", str(error).partition("\n")[0]).partition(". ")[0]


def reduced(tensor: Any, group: Any | None, reduce_op: ReduceOp | str | None) -> Any:
    """What ``Strategy.reduce`` returns, as with Lightning's strategies up to two things.

    There is no barrier, at which the host would wait for the GPU. And a mean of integers is in float64: Lightning
    rounds it down, and ``self.log(..., sync_dist=True)`` divides by the mean of the ranks' numbers of examples: the
    mean of five ones on two ranks would be 5/2 / 2.

    Args:
        tensor: to be reduced over ranks, in place unless it changes its dtype; anything else is returned as it is.
        group: of ranks; all of them if None.
        reduce_op: an operation of ``torch.distributed``, or its name; also "mean".
    """
    if not isinstance(tensor, Tensor) or not torch.distributed.is_initialized():
        return tensor
    is_mean = reduce_op in ("mean", "avg", ReduceOp.AVG)  # which gloo does not have
    if is_mean and not tensor.is_floating_point():
        tensor = tensor.double()
    operation = getattr(ReduceOp, reduce_op.upper()) if isinstance(reduce_op, str) and not is_mean else reduce_op
    torch.distributed.all_reduce(tensor, ReduceOp.SUM if is_mean else operation, group)
    return tensor.div_(torch.distributed.get_world_size(group)) if is_mean else tensor


def leave_at_exit() -> None:
    """Makes this process leave the process group when it ends; Lightning does so with NCCL only.

    The interpreter does not wait for gloo's threads, which sometimes abort a process at its end: "terminate called
    without an active exception", status 134.
    """
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def checksum(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Two integers in float64, (2,), that change with any single number in the tensors, all on `device`.

    They are made of the sum of all data as 64-bit integers, in any order, without synchronizing with the device.
    """
    sums = [_sum_of_words(tensor) for tensor in tensors]
    if not sums:
        return torch.zeros(2, dtype=torch.float64, device=device)
    factors = torch.arange(1, 2 * len(sums), 2, device=device) * _MIX  # odd, so that no sum is lost; wraps around
    total = (torch.stack(sums) * factors).sum()
    return torch.stack([total >> 32, total & 0xFFFFFFFF]).double()


def _sum_of_words(tensor: Tensor) -> Tensor:
    data = flat_bytes(tensor)
    if data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // 8 * 8
    return data[:whole].view(torch.int64).sum() + data[whole:].sum(dtype=torch.int64)


def _held(module: L.LightningModule, optimizer: ZerothOrderOptimizer) -> Iterator[Tensor]:
    """Parameters and a method's state that all ranks hold whole, in an order that does not depend on the rank."""
    yield from itertools.filterfalse(is_sharded, module.parameters())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in sorted(optimizer.state.get(parameter, {}).items()):
                # Of a sharded weight, the state in a subspace
                is_own = optimizer.is_by_element(parameter, name) and is_sharded(parameter)
                if isinstance(value, Tensor) and not is_own:
                    yield value


def _odd_one(values: Sequence[Any]) -> tuple[int, int] | None:
    """The first rank whose value is not the most common one, and the first rank with that; None if all are equal."""
    usual = Counter(values).most_common(1)[0][0]
    odd = next((rank for rank, value in enumerate(values) if value != usual), None)
    return None if odd is None else (odd, values.index(usual))
