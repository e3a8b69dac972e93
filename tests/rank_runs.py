"""Program: runs that end well, on some ranks and on one; writes what each leaves. Rank r of n takes every n-th example.

``python rank_runs.py FOLDER`` writes ``NAME-RANK-of-RANKS.pt``.
"""

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from forked_ranks import end_process, fork_ranks
from zolightning.blocks import Bandit
from zolightning.callbacks import (
    ActivationBases,
    BlockCoordinateDescent,
    KeepLedger,
    LearningRateControl,
    LearningRateProbe,
    MomentumTransport,
    RunOverview,
    SubspaceResampling,
    ZerothOrder,
)
from zolightning.checkpoints.replay import replay
from zolightning.optim import LOZO, ZOMOPI, HiZOO, MeZO, MeZOAdam
from zolightning.optim.estimators import OneSided, PerExample, Population
from zolightning.strategies import ZerothOrderDDP

STEPS, BATCH = 10, 8
INPUTS = torch.randn(STEPS * BATCH, 4, generator=torch.Generator().manual_seed(1))
TARGETS = INPUTS.sum(1, keepdim=True)
BAD_TARGET = TARGETS[BATCH * 3 + 1].item()  # in batch 3, on rank 1 of 2
NONE = torch.cat([TARGETS[1::2], TARGETS[BATCH * 6 : BATCH * 7]])  # rank 1 of 2, and batch 6

# By name: the method, what is special about the run, and by how many ranks it is also done beside one.
RUNS: dict[str, tuple[Any, dict[str, Any], tuple[int, ...]]] = {
    "plain": (partial(MeZO, lr=1e-2), {"strategy": "ddp"}, (2,)),
    "losses_only": (partial(MeZO, lr=1e-2), {"overview": True}, (2,)),
    "weighted": (partial(MeZO, lr=1e-2, momentum=0.5, normalize=True), {"weighted": True}, (2,)),
    "micro_batches": (partial(MeZO, lr=1e-2), {"weighted": True, "micro_batch_size": 3}, (2,)),
    "adam": (partial(MeZOAdam, lr=1e-2, estimator=OneSided(), num_queries=2), {"strategy": "ddp"}, (2,)),
    "bf16": (partial(MeZO, lr=1e-2, weight_decay=0.1), {"precision": "bf16-true"}, (2,)),
    "skipped": (partial(MeZO, lr=1e-2), {"bad_step": 3}, (2,)),
    # Step 3 is skipped by rank 1 of 2, step 6 by both
    "none": (partial(MeZO, lr=1e-2), {"micro_batch_size": 1, "none_steps": (3, 6)}, (2,)),
    "subspace": (partial(ZOMOPI, lr=1e-2, rank=2, power_rank=1, vector_lr=1e-3), {"resample": True}, (2,)),
    "blocks": (partial(MeZO, lr=1e-2, momentum=0.5), {"blocks": ["net.0", "net.1", "net.4"]}, (2,)),
    "activations": (partial(LOZO, lr=1e-2, rank=2), {"activations": True}, (2,)),
    "stacked": (
        partial(LOZO, lr=1e-2, num_queries=2, momentum=0.5),
        {"resample": True, "stacked": 4, "overview": True},
        (2,),
    ),
    "examples": (
        partial(LOZO, lr=1e-2, num_queries=8, momentum=0.5, estimator=PerExample()),
        {"resample": True, "micro_batch_size": 3, "weighted": True},
        (2,),
    ),
    # Ranks that share the evaluations of a step
    "queries": (partial(MeZO, lr=1e-2, num_queries=2), {"size": 2, "noisy": True, "weighted": True}, (2,)),
    "signs": (partial(MeZO, lr=1e-2), {"size": 2, "bad_step": 3, "noisy": True}, (2,)),
    "three_points": (partial(HiZOO, lr=1e-2), {"size": 2, "precision": "bf16-true", "overview": True}, (2,)),
    "population": (
        partial(ZOMOPI, lr=1e-2, rank=2, power_rank=1, vector_lr=1e-3, num_queries=3, estimator=Population()),
        {"size": 2, "resample": True},
        (2,),
    ),
    "stacked_queries": (
        partial(LOZO, lr=1e-2, num_queries=2, momentum=0.5),
        {"size": 2, "resample": True, "stacked": 2},
        (2,),
    ),
    "blocks_queries": (
        partial(MeZO, lr=1e-2, num_queries=2),
        {"size": 2, "blocks": ["net.0", "net.1", "net.4"]},
        (2,),
    ),
    "activations_queries": (partial(LOZO, lr=1e-2, rank=2, num_queries=2), {"size": 2, "activations": True}, (2,)),
    "probed": (partial(MeZO, lr=1e-2, num_queries=2), {"size": 2, "probe": True}, (2,)),
    "two_dimensions": (partial(MeZO, lr=1e-2), {"size": 2, "overview": True}, (4,)),
    "signs_of_examples": (
        partial(MeZO, lr=1e-2, num_queries=8, estimator=PerExample()),
        {"size": 2, "carries": True},
        (2,),
    ),
    "carried": (partial(MeZO, lr=1e-2, num_queries=2), {"size": 2, "carries": True}, (2,)),
}


class Recorder(L.Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.rows: list[Tensor] = []
        self.validated: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.steps.append(vars(trainer.optimizers[0].record))
        self.rows.append(batch[0])
        self.model = type(trainer.strategy.model).__name__

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.validated.append(batch[0])


class Module(L.LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        # Without DistributedDataParallel, too, the other ranks start elsewhere, and are given the weights of the first.
        torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 1))
        self.options = options
        if options.get("carries"):
            self.register_buffer("running", torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        if batch_idx in self.options.get("none_steps", ()) and torch.isin(targets, NONE).all():
            return None
        if self.options.get("noisy"):
            inputs = inputs + torch.randn_like(inputs)
        outputs = self.net(inputs)
        if self.options.get("carries"):  # from step to step
            outputs, self.running = outputs + self.running, outputs.mean(0)
        errors = (outputs - targets).float().square()[:, 0]
        if self.options.get("bad_step") == batch_idx:
            errors = torch.where(targets[:, 0] == BAD_TARGET, float("nan"), errors)
        if not self.options.get("weighted"):
            return errors.mean()
        counts = (inputs[:, 0].abs() * 5).long() + 1
        return {"loss": (errors * counts).sum() / counts.sum(), "num_terms": counts.sum()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> None:
        return None  # of its own: all parameters train


def make_trainer(ranks: int, callbacks: list[L.Callback], strategy: Any, **kwargs: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    kwargs = quiet | {"enable_checkpointing": False, "max_steps": STEPS, "limit_val_batches": 0} | kwargs
    strategy = strategy if ranks > 1 else "auto"
    return L.Trainer(accelerator="cpu", devices=ranks, strategy=strategy, callbacks=callbacks, **kwargs)


def loader(rank: int, parts: int, rows: int = len(INPUTS)) -> DataLoader:
    """This part's rows of each batch, in order."""
    data = TensorDataset(INPUTS[:rows], TARGETS[:rows])
    return DataLoader(data, batch_size=BATCH // parts, sampler=range(rank, rows, parts))


def train(name: str, ranks: int, folder: Path) -> None:
    method, options, _ = RUNS[name]
    module, recorder, ledger = Module(**options), Recorder(), KeepLedger(folder / f"{name}-of-{ranks}")
    size = options.get("size", 1)
    callbacks: list[Any] = [
        ZerothOrder(
            method,
            micro_batch_size=options.get("micro_batch_size"),
            skip_nonfinite="bad_step" in options,
            evaluations_per_forward=options.get("stacked", 1),
        )
    ]
    if "resample" in options:
        callbacks += [SubspaceResampling(interval=4, anchor=1), MomentumTransport("project")]
    if "activations" in options:
        callbacks += [SubspaceResampling(interval=4, bases=ActivationBases(examples="batch", refresh=True))]
    if "blocks" in options:
        callbacks += [BlockCoordinateDescent(Bandit(step_size=0.5, queries=1), interval=2, patterns=options["blocks"])]
    if "probe" in options:
        callbacks += [LearningRateProbe(num_steps=3, num_examples=16), LearningRateControl(interval=2, patience=1)]
    if "overview" in options:  # which takes as long as a third of such a run
        callbacks += [RunOverview()]
    trainer = make_trainer(
        ranks,
        [*callbacks, recorder, ledger],
        options.get("strategy") or ZerothOrderDDP(perturbation_parallel_size=size, check_interval=3),
        precision=options.get("precision", "32-true"),
        use_distributed_sampler=False,
    )
    trainer.fit(module, loader(trainer.global_rank // size, max(1, ranks // size)))
    left = {"weights": module.state_dict(), "steps": recorder.steps, "global_step": trainer.global_step}
    left["model"] = recorder.model
    if ledger.path is not None:
        base = Module(**options)  # as rank 0 began
        left["replayed"] = [replay(ledger.path, base, method).sealed, base.state_dict()]
    torch.save(left, folder / f"{name}-{trainer.global_rank}-of-{ranks}.pt")


def train_with_lightnings_sampler(ranks: int, folder: Path) -> None:
    """What a loader of somebody else's becomes: its rows in training and in validation."""
    recorder = Recorder()
    data = TensorDataset(INPUTS[:, :1], INPUTS[:, :1])
    trainer = make_trainer(
        ranks,
        [ZerothOrder(partial(MeZO, lr=1e-2)), recorder],
        ZerothOrderDDP(perturbation_parallel_size=2),
        limit_val_batches=1.0,
        num_sanity_val_steps=0,
    )
    module = Module()
    module.net = nn.Linear(1, 1)
    sampler = DistributedSampler(data, num_replicas=1, rank=0) if ranks == 1 else None  # Lightning's
    trainer.fit(module, DataLoader(data, batch_size=BATCH, sampler=sampler), DataLoader(data, batch_size=4))
    left = {
        "rows": torch.stack(recorder.rows),
        "validated": torch.cat(recorder.validated),
        "weights": module.state_dict(),
    }
    torch.save(left, folder / f"sampler-{trainer.global_rank}-of-{ranks}.pt")


def refuse(folder: Path) -> None:
    """Runs that end before the first step."""
    module = Module()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    refused = {}
    cases: dict[str, tuple[list[L.Callback], int]] = {
        "sgd": ([], 1),
        "few": ([ZerothOrder(partial(HiZOO, lr=1e-2))], 4),
    }
    for name, (callbacks, size) in cases.items():
        trainer = make_trainer(4, callbacks, ZerothOrderDDP(perturbation_parallel_size=size))
        try:
            trainer.fit(module, loader(0, 1))
        except MisconfigurationException as error:
            refused[name] = [str(error), trainer.global_step]
    torch.save(refused, folder / f"refused-{trainer.global_rank}-of-4.pt")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for ranks in (1, 2, 4):
        names = [name for name, (*_, others) in RUNS.items() if ranks in (1, *others)]

        def run(ranks: int = ranks, names: list[str] = names) -> None:
            for name in names:
                train(name, ranks, folder)
            if ranks < 4:
                train_with_lightnings_sampler(ranks, folder)
            else:
                refuse(folder)
            end_process()

        codes = fork_ranks(ranks, run, folder / f"error-{ranks}")
        if any(codes):
            raise SystemExit("\n".join(path.read_text() for path in folder.glob("error-*.txt")) or str(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
