"""Runs that are killed at any moment and started again, until they end, beside one that nobody killed.

A program: it imports everything once and forks, in which a run is killed by itself (SIGKILL) at the n-th event of
Python's profiler, a call or return of any function, anywhere or within the functions of a place. So moments are drawn
by a seed, and the same ones again.
"""

import json
import logging
import os
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from zolightning.blocks import Bandit
from zolightning.callbacks import (
    BlockCoordinateDescent,
    KeepLedger,
    MomentumTransport,
    RunMonitor,
    SaveLast,
    SubspaceResampling,
    ZerothOrder,
)
from zolightning.checkpoints.checkpoint_io import AtomicCheckpointIO
from zolightning.checkpoints.ledger import Ledger
from zolightning.checkpoints.replay import replay
from zolightning.commands.event_log import event_files
from zolightning.optim import LOZO, ZOMOPI, HiZOO, MeZO, ZerothOrderOptimizer
from zolightning.weights_digest import weights_digest

STEPS = 14
KILLS_A_RUN = 4
METHODS: dict[str, tuple[Callable[..., ZerothOrderOptimizer], Callable[[], list[Callback]]]] = {
    "mezo": (partial(MeZO, lr=1e-2, momentum=0.9), list),
    "lozo": (partial(LOZO, lr=0.03, rank=2, momentum=0.9), lambda: [SubspaceResampling(4)]),
    "hizoo in blocks": (
        partial(HiZOO, lr=0.01),
        lambda: [BlockCoordinateDescent(Bandit(), 3, patterns=[r"net\.0", r"net\.2"])],
    ),
    "zo-mopi": (
        partial(ZOMOPI, lr=0.05, rank=3, power_rank=1, vector_lr=0.04),
        lambda: [SubspaceResampling(4, anchor=1), MomentumTransport()],
    ),
}
# The function within which to kill, by name; None for anywhere
PLACES: dict[str, Callable[..., Any] | None] = {
    "anywhere": None,
    "in a step": ZerothOrder._step,
    "in an update": ZerothOrderOptimizer.apply,
    "writing a checkpoint": AtomicCheckpointIO.save_checkpoint,
    "writing the ledger": Ledger.append,
    "in a validation": _EvaluationLoop.run,
}


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.net(batch[0] + 0.1 * torch.randn_like(batch[0])), batch[1])
        self.log("train/own", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Moment:
    """A profiler that counts events in each place, and kills this process at the n-th in one of them."""

    def __init__(self, said: Path, place: str = "", n: int = 0) -> None:
        self.said, self.place, self.n = said, place, n
        self.count = dict.fromkeys(PLACES, 0)
        self._codes = {function.__code__: name for name, function in PLACES.items() if function is not None}
        self._within: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if (place := self._codes.get(frame.f_code)) is not None:
            if event == "call":
                self._within.append(place)
            elif event == "return":
                self._within.remove(place)
        for name in ("anywhere", *self._within):
            self.count[name] += 1
            if name == self.place and self.count[name] == self.n:
                sys.setprofile(None)
                stack = [function.name for function in traceback.extract_stack(frame)]
                self.said.write_text(json.dumps({"stack": stack[-6:]}))
                os.kill(os.getpid(), signal.SIGKILL)


def fit(folder: Path, method: str) -> None:
    """Begins a run, or goes on with it; at its end, says what it is."""
    make_method, make_callbacks = METHODS[method]
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(24, 4, generator=generator)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    module = Module()
    base = weights_digest(dict(module.named_parameters()))
    keep = KeepLedger(folder, folder / "ledger.bin")
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=30)
    trainer = L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=1,
        logger=TensorBoardLogger(folder, name="", version=""),
        log_every_n_steps=1,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            ZerothOrder(make_method, schedule),
            *make_callbacks(),
            keep,
            RunMonitor(),
            ModelCheckpoint(folder, "best-{step}", monitor="val/loss", enable_version_counter=False),
            SaveLast(folder, every_n_train_steps=3),
        ],
    )
    loaders = [StatefulDataLoader(data, batch_size=4) for _ in range(2)]
    trainer.fit(module, *loaders, ckpt_path="last" if (folder / "last.ckpt").exists() else None)
    sys.setprofile(None)
    weights = weights_digest(dict(module.named_parameters()))
    again = Module()
    assert weights_digest(dict(again.named_parameters())) == base
    replayed = replay(folder / "ledger.bin", again, make_method)
    result = {
        "weights": weights,
        "replayed": [replayed.steps, replayed.sealed, weights_digest(dict(again.named_parameters()))],
        "ledger": (folder / "ledger.bin").read_bytes().hex(),
        "best": Path(trainer.checkpoint_callback.best_model_path).name,
        # A best one that is no longer the best may be left.
        "files": sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".unfinished")),
        "checkpoint": weights_digest(torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]),
        "logged": logged(folder),
    }
    (folder / "result.json").write_text(json.dumps(result))


def logged(folder: Path) -> dict[str, list[list[float]]]:
    """Steps and values of the scalars in TensorBoard's files, by name, but for those of a clock and memory."""
    found: dict[str, list[list[float]]] = {}
    for file in event_files(folder):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            if not tag.startswith("run/"):
                found.setdefault(tag, []).extend([event.step, event.value] for event in events.Scalars(tag))
    # With every kind of metrics, so that it is there twice after a validation
    return found | {"epoch": [list(pair) for pair in sorted(set(map(tuple, found["epoch"])))]}


def forked(function: Callable[[], None], moment: Moment | None, errors: Path) -> int:
    """Calls a function in a fork, which is killed at a moment; returns its exit code."""

    def run() -> None:
        try:
            sys.setprofile(moment)
            function()
            sys.setprofile(None)
            if moment is not None:
                moment.said.write_text(json.dumps(moment.count))
        except BaseException:
            sys.setprofile(None)
            errors.write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)

    process = get_context("fork").Process(target=run)
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), errors.read_text() if errors.exists() else process.exitcode
    return process.exitcode


def main(folder: Path, kills: int, seed: int) -> None:
    """Kills runs, some times each; ``found.json`` says where, and in what they differ from runs that nobody killed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    draw = random.Random(seed)
    killed: list[dict[str, Any]] = []
    differences: list[str] = []
    while len(killed) < kills:
        method, run = draw.choice(list(METHODS)), folder / f"run-{len(killed)}"
        run.mkdir()
        for _ in range(KILLS_A_RUN):
            place = list(PLACES)[len(killed) % len(PLACES)]
            ledger = run / "ledger.bin"
            steps = len(Ledger(ledger)) if ledger.exists() else 0
            most = count(folder, method)[place] * (STEPS - steps) // STEPS
            moment = Moment(run / "said.json", place, draw.randint(1, max(1, most)))
            if forked(partial(fit, run, method), moment, run / "error.txt") == 0:
                break  # it ended before
            killed.append({"place": place, "step": steps} | json.loads(moment.said.read_text()))
            moment.said.unlink()
        forked(partial(fit, run, method), None, run / "error.txt")
        expected, ended = (json.loads((f / "result.json").read_text()) for f in (whole(folder, method), run))
        differences += [f"{run.name}, {method}: {name}" for name in expected if ended[name] != expected[name]]
    (folder / "found.json").write_text(json.dumps({"killed": killed, "differences": differences}))


@cache
def whole(folder: Path, method: str) -> Path:
    """A run that nobody kills."""
    (made := folder / f"whole-{method}").mkdir()
    forked(partial(fit, made, method), None, made / "error.txt")
    return made


@cache
def count(folder: Path, method: str) -> dict[str, int]:
    """How many events a run has in each place."""
    (made := folder / f"counted-{method}").mkdir()
    moment = Moment(made / "said.json")
    forked(partial(fit, made, method), moment, made / "error.txt")
    counts: dict[str, int] = json.loads(moment.said.read_text())
    return counts


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
