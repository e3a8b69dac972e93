"""Program: runs of two ranks; writes what each logs.

``python rank_logs.py FOLDER`` writes ``NAME-RANK.pt``.
"""

import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError

from forked_ranks import end_process, fork_ranks
from rank_runs import STEPS, Module, loader, make_trainer
from zolightning.callbacks import SaveLast, ZerothOrder
from zolightning.models.pretrained_module import Evaluation, PretrainedModule
from zolightning.optim import MeZO
from zolightning.strategies import ZerothOrderDDP, ZerothOrderFSDP


class Batches:
    """Batches of a rank, which go on where a checkpoint was written."""

    def __init__(self, rank: int) -> None:
        self.batches, self.next = list(loader(rank, 2)), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


class Averaging(Module):
    """Logs in the ways that an epoch sums up over ranks; some of it in its first two batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.error = MeanAbsoluteError()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.error(self.net(batch[0]), batch[1])
        self.log("error", self.error, on_step=False, on_epoch=True)
        for reduced in ("mean", "max", "sum"):
            self.log(reduced, loss, on_step=False, on_epoch=True, reduce_fx=reduced, sync_dist=True)
            if batch_idx < 2:
                self.log(f"early_{reduced}", loss, on_step=False, on_epoch=True, reduce_fx=reduced, sync_dist=True)
        return loss


def train_in_two_parts(folder: Path) -> None:
    """What an epoch logs in which a run stops, and in which it does not."""
    logged = {}
    for name, parts in (("whole", (STEPS,)), ("in two parts", (4, STEPS))):
        for steps in parts:
            trainer = make_trainer(
                2,
                [ZerothOrder(partial(MeZO, lr=1e-2)), SaveLast(folder / name)],
                ZerothOrderDDP(),
                enable_checkpointing=True,
                max_steps=steps,
            )
            path = None if steps == parts[0] else folder / name / "last.ckpt"
            trainer.fit(Averaging(), Batches(trainer.global_rank), ckpt_path=path)
        logged[name] = dict(trainer.callback_metrics)
    torch.save(logged, folder / f"logged-{trainer.global_rank}.pt")


class Means(L.LightningModule):
    """Logs the mean of what is in a batch: as anybody does, and as a module of the package does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.metrics = nn.ModuleList(nn.Linear(1, 1) for _ in range(2)), nn.ModuleDict()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return PretrainedModule.training_step(self, {"label": batch, "objective": "classification"}, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("own", batch.mean(), batch_size=len(batch), sync_dist=True)
        PretrainedModule._evaluation_step(self, {"label": batch}, "val")

    def evaluate(self, batch: Any) -> Evaluation:
        outputs = self.layers[1](self.layers[0](torch.zeros(1, 1, device=self.device)))
        loss = batch["label"].mean() + 0 * outputs.sum()
        return Evaluation(loss, torch.tensor(len(batch["label"])), batch["label"])

    def right(self, batch: Any, scores: Tensor) -> Tensor:
        return scores

    def prediction(self, scores: Tensor) -> Tensor:
        return scores

    def means(self, batch: Any, scores: Tensor) -> dict[str, float]:
        return {"reward": batch["label"].mean().item()}


def validate_uneven_parts(folder: Path) -> None:
    """Two ranks with three and with two examples."""
    logged = {}
    for name, strategy in (("ddp", "ddp"), ("zo_ddp", ZerothOrderDDP()), ("zo_fsdp", ZerothOrderFSDP())):
        trainer = make_trainer(2, [], strategy, limit_val_batches=1, use_distributed_sampler=False)
        ones = torch.ones(3 - trainer.global_rank)
        (logged[name],) = trainer.validate(Means(), DataLoader([ones], batch_size=None), verbose=False)
    torch.save(logged, folder / f"means-{trainer.global_rank}.pt")


def train_on_unlike_parts(folder: Path) -> None:
    """Two ranks, with zeros and with ones, and in micro-batches with two of them and with one."""
    logged = {}
    strategies = {"ddp": "ddp", "zo_ddp": ZerothOrderDDP(), "zo_fsdp": ZerothOrderFSDP(), "parts": ZerothOrderDDP()}
    for name, strategy in strategies.items():
        size = 1 if name == "parts" else None
        callbacks = [] if name == "ddp" else [ZerothOrder(partial(MeZO, lr=1e-2), micro_batch_size=size)]
        trainer = make_trainer(2, callbacks, strategy, max_steps=3, use_distributed_sampler=False)
        rows = 2 - trainer.global_rank if name == "parts" else 2
        module = Means()
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=0.1)
        trainer.fit(module, DataLoader([torch.full((rows,), float(trainer.global_rank))] * 3, batch_size=None))
        logged[name] = {key: value.item() for key, value in trainer.callback_metrics.items() if "train" in key}
    torch.save(logged, folder / f"trained-{trainer.global_rank}.pt")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def run() -> None:
        train_in_two_parts(folder)
        validate_uneven_parts(folder)
        train_on_unlike_parts(folder)
        end_process()

    codes = fork_ranks(2, run, folder / "error")
    if any(codes):
        raise SystemExit("\n".join(path.read_text() for path in folder.glob("error-*.txt")) or str(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
