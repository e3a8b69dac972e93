"""A module that can be told to do something in a step, and runs of it that stop and go on."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning.callbacks import SubspaceResampling, ZerothOrder
from zolightning.checkpoints.checkpoint_io import AtomicCheckpointIO
from zolightning.checkpoints.save_last import SaveLast
from zolightning.optim import LOZO, MeZO

MEZO = partial(MeZO, lr=1e-2, momentum=0.9)
AS_EXPECTED = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata 0.11 with torch 2.13
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
EVERY_6 = {"val_check_interval": 6, "check_val_every_n_epoch": None}


class Killed(BaseException):
    """Nobody handles it, as nobody handles a kill."""


def die() -> None:
    raise Killed


class Plan:
    """What is to be done once, and when; an object of its own, as what a step changes in a module's dictionaries is
    there again for each of its evaluations."""

    def __init__(self) -> None:
        self.at: dict[Any, Callable[[], Any]] = {}

    def do(self, when: Any) -> Any:
        return self.at.pop(when, lambda: None)()


class Validated(L.LightningModule):
    """Logs what its weights are worth, and can be told to do something in a step or in a batch of a validation."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.in_step, self.in_validation = Plan(), Plan()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        factor = self.in_step.do(self.trainer.global_step)
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        return loss if factor is None else factor * loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.in_validation.do((self.trainer.global_step, batch_idx))
        self.log("val/loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test/loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Watch(Callback):
    """Keeps the numbers of a run by step."""

    def __init__(self) -> None:
        self.grads: dict[int, tuple[float, ...]] = {}
        self.validated: dict[int, float] = {}
        self.batches: list[int] = []
        self.epochs: dict[int, int] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        record = getattr(trainer.optimizers[0], "record", None)
        self.epochs[trainer.global_step] = trainer.current_epoch
        self.grads[trainer.global_step] = record.projected_grads if record else ()

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        assert trainer.global_step not in self.validated
        self.validated[trainer.global_step] = float(trainer.callback_metrics["val/loss"])
        self.batches.append(trainer.fit_loop.epoch_loop._batches_that_stepped)


class Run:
    """A run of a fresh module, Trainer and loaders, in a folder with earlier ones; 7 batches make an epoch."""

    def __init__(self, make_trainer: Callable[..., L.Trainer], folder: Path, data: Any, **options: Any) -> None:
        method, callbacks = options.pop("method", MEZO), options.pop("callbacks", [])
        self.module, self.watch = Validated(), Watch()
        self.last = SaveLast(folder, **options.pop("last", {}))
        resampling = [SubspaceResampling(interval=4)] if method is not None and method.func is LOZO else []
        zeroth_order = [] if method is None else [ZerothOrder(method), *resampling]
        defaults = {
            "max_steps": 20,
            "enable_checkpointing": True,
            "num_sanity_val_steps": 0,
            "plugins": [AtomicCheckpointIO()],
        }
        self.trainer = make_trainer(callbacks=[self.last, *zeroth_order, self.watch, *callbacks], **defaults | options)
        self.data, self.path = data, folder / "last.ckpt"

    def fit(self, ckpt_path: Any = None, validate: bool = True) -> "Run":
        from torchdata.stateful_dataloader import StatefulDataLoader  # images with CUDA come without

        L.seed_everything(5, verbose=False)
        loaders = [StatefulDataLoader(self.data, batch_size=4) for _ in range(2)]
        self.trainer.fit(self.module, *loaders[: 1 + validate], ckpt_path=ckpt_path)
        return self

    def saved(self) -> dict[str, Any]:
        return torch.load(self.path, weights_only=True)

    def assert_ends_as(self, other: "Run") -> None:
        for (name, one), two in zip(self.module.named_parameters(), other.module.parameters(), strict=True):
            assert torch.equal(one, two), name
        assert self.trainer.global_step == other.trainer.global_step


def steps_evaluated(run: Run) -> set[int]:
    """Remembers in which steps the loss of a run is evaluated."""
    own, found = run.module.training_step, set()

    def training_step(batch: Any, batch_idx: int) -> Tensor:
        found.add(run.trainer.global_step)
        return own(batch, batch_idx)

    run.module.training_step = training_step
    return found
