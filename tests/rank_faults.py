"""Program: runs of two ranks that something happens to; writes how each rank ends, and what a run has that goes on.

``python rank_faults.py FOLDER`` writes ``CASE-RANK.txt``, a traceback, for a rank that fails.
"""

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import zolightning.__main__
from forked_ranks import fork_ranks
from rank_runs import BATCH, INPUTS, TARGETS, Module, loader, make_trainer
from zolightning.callbacks import SaveLast, SubspaceResampling, ZerothOrder
from zolightning.checkpoints.checkpoint_io import AtomicCheckpointIO
from zolightning.optim import LOZO, MeZO
from zolightning.strategies import ZerothOrderDDP, ZerothOrderFSDP


class At(L.Callback):
    """Does something on rank 1, or another one, when a step has been taken."""

    def __init__(self, step: int, action: Callable[[L.Trainer], Any], rank: int = 1) -> None:
        self.step, self.action, self.rank = step, action, rank

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if (trainer.global_step, trainer.global_rank) == (self.step, self.rank):
            self.action(trainer)


class Endless(IterableDataset):
    """Batches whose number nobody knows: `count`."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return iter([(INPUTS[:BATCH], TARGETS[:BATCH])] * self.count)


def resumable() -> DataLoader:
    """Goes on in mid-epoch, as a plain loader does not."""
    return StatefulDataLoader(TensorDataset(INPUTS, TARGETS), batch_size=BATCH)


class Lame(Module):
    """Has a loss of NaN on rank 1 at batch 2."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if (batch_idx, self.global_rank) == (2, 1) else loss


def fit(
    *callbacks: L.Callback,
    ranks: int = 2,
    size: int = 2,
    module: L.LightningModule | None = None,
    data: DataLoader | None = None,
    ckpt_path: Path | None = None,
    timeout: float = 60,
    method: Any = MeZO,
    strategy: Any = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Trains a module by ranks that share the evaluations, unless a strategy is given, and returns its weights."""
    wait = timedelta(seconds=timeout)
    strategy = strategy or ZerothOrderDDP(perturbation_parallel_size=size, check_interval=4, timeout=wait)
    zeroth_order = ZerothOrder(partial(method, lr=1e-2, momentum=0.9))
    kwargs = {"use_distributed_sampler": False} | kwargs
    trainer = make_trainer(ranks, [zeroth_order, *callbacks], strategy, plugins=[AtomicCheckpointIO()], **kwargs)
    module = module or Module()
    trainer.fit(module, loader(0, 1) if data is None else data, ckpt_path=ckpt_path, weights_only=True)
    return module.state_dict()


def command(run: Callable[[], Any]) -> None:
    """Runs a fit as what the command ``zolightning`` runs."""
    zolightning.__main__.ZerothOrderCLI = lambda args: run()
    zolightning.__main__.main([])


def flip(tensor: Tensor) -> None:
    """One bit of the last number, not its last one, which the rounding of the next step may put right."""
    tensor.detach().view(torch.int32).view(-1)[-1] ^= 1 << 10


def mean_gradient(trainer: L.Trainer) -> Tensor:
    (optimizer,) = trainer.optimizers
    return next(tensor for tensor in optimizer.state[trainer.lightning_module.net[0].weight].values())


def of_shards() -> ZerothOrderFSDP:
    strategy: Any = ZerothOrderFSDP(layers_name="net")
    strategy.check_interval = 4
    return strategy


def rank() -> int:
    return int(os.environ["LOCAL_RANK"])


# After these a process goes on: all ranks end at the same place.
TOGETHER: dict[str, Callable[[], Any]] = {
    "weight": lambda: fit(At(5, lambda trainer: flip(trainer.lightning_module.net[0].weight))),
    # Just before the comparison: the weights are still equal
    "state": lambda: fit(At(8, lambda trainer: flip(mean_gradient(trainer)))),
    # Of a weight whose rows are shared, on each rank whole
    "core": lambda: fit(
        SubspaceResampling(),
        At(8, lambda trainer: flip(mean_gradient(trainer))),
        method=LOZO,
        strategy=of_shards(),
    ),
    "rows": lambda: fit(data=loader(rank(), 2)),
    "lengths": lambda: fit(size=1, data=loader(0, 1, rows=80 - 8 * rank())),
    "nan": lambda: fit(module=Lame()),
}


def cases(folder: Path) -> dict[str, Callable[[], Any]]:
    def together() -> None:
        for name, run in TOGETHER.items():
            try:
                run()
            except Exception:
                (folder / f"{name}-{rank()}.txt").write_text(traceback.format_exc())

    def die(trainer: L.Trainer) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(trainer: L.Trainer) -> None:
        raise MemoryError("too large")

    def validate_first() -> None:
        class Told(L.Callback):
            def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
                if trainer.is_global_zero:
                    os.kill(os.getpid(), signal.SIGTERM)
                trainer.strategy.barrier()

        strategy = ZerothOrderDDP(timeout=timedelta(seconds=60))
        trainer = make_trainer(2, [SaveLast(folder), Told()], strategy, limit_val_batches=1, enable_checkpointing=True)
        trainer.validate(Module(), loader(0, 1), verbose=False)

    return {
        "together": together,
        "killed": lambda: fit(
            SaveLast(folder / "killed", every_n_train_steps=2),
            At(5, die),
            data=resumable(),
            enable_checkpointing=True,
        ),
        "outside_of_a_step": lambda: command(
            partial(fit, At(5, lambda trainer: trainer.strategy.barrier(), rank=0), At(5, die))
        ),
        "told_before_training": lambda: command(validate_first),
        "first_killed": lambda: fit(At(5, die, rank=0)),
        "hangs": lambda: fit(At(5, lambda trainer: time.sleep(4)), timeout=2),
        "ends": lambda: fit(data=DataLoader(Endless(8 - 3 * rank()), batch_size=None), max_epochs=1, max_steps=-1),
        "fails": lambda: fit(At(5, fail)),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, run in cases(folder).items():
        print(name, fork_ranks(2, run, folder / name), flush=True)

    def save(name: str, **kwargs: Any) -> None:
        torch.save(fit(data=resumable(), **kwargs), folder / f"{name}.pt")

    fork_ranks(1, partial(save, "whole", ranks=1), folder / "whole")
    last = folder / "killed" / "last.ckpt"
    for ranks in (1, 2):
        fork_ranks(ranks, partial(save, f"resumed_by_{ranks}", ranks=ranks, ckpt_path=last), folder / "resumed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
