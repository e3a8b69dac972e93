"""Program: runs on ranks that share their weights, and on one; writes what each leaves.

``python shard_runs.py FOLDER`` writes ``NAME-RUN-RANK.pt`` and ``NAME-RUN.ckpt``. Rank r of n takes every n-th example.
"""

import os
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from forked_ranks import end_process, fork_ranks
from rank_runs import BATCH, Recorder, loader, make_trainer
from zolightning.blocks import Cyclic, WeightNorm
from zolightning.callbacks import (
    ActivationBases,
    BlockCoordinateDescent,
    KeepLedger,
    LearningRateProbe,
    SubspaceResampling,
    ZerothOrder,
    folding,
)
from zolightning.checkpoints.replay import replay
from zolightning.optim import EGGROLL, LOZO, HiZOO, MeZO, MeZOAdam, SparseMeZO, StepRecord, SubZero, ZOAdaMM
from zolightning.optim.dense import DenseOptimizer
from zolightning.optim.estimators import OneSided, PerExample
from zolightning.strategies import ZerothOrderDDP, ZerothOrderFSDP

EPOCHS, BATCHES = 3, 2
STEPS = EPOCHS * BATCHES
WORDS, WIDTH = 7, 3  # rows that two ranks cannot share evenly, and shards that begin with an odd element


class Foreign(DenseOptimizer):
    """A method of somebody's own, which moves all of a weight."""

    def update(self, record: StepRecord) -> None:
        raise NotImplementedError


# By name: the method, and what is special about the run
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "blocks": (
        partial(MeZO, lr=1e-2, num_queries=2, momentum=0.5, weight_decay=0.1),
        {"precision": "bf16-true", "exact": True, "blocks": ["net.layers.0", "net.layers.1"], "bad_step": 0},
    ),
    "factors": (
        partial(LOZO, lr=1e-2, rank=2, momentum=0.5, vector_lr=1e-3),
        {"precision": "bf16-true", "resample": 1, "waits": True, "probe": True},
    ),
    "both_sides": (partial(SubZero, lr=1e-2, rank=2, betas=(0.9, 0.95)), {"resample": 0, "head": True}),
    "curvature": (partial(HiZOO, lr=1e-2, smoothing=0.1), {"precision": "bf16-true", "bad_step": 1}),
    "small_weights": (partial(SparseMeZO, lr=1e-2, sparsity=0.5), {"precision": "bf16-true"}),
    "random_weights": (
        partial(SparseMeZO, lr=1e-2, mask="random"),
        {"precision": "64-true", "blocks": ["net.layers.0", "net.layers.1"], "order": WeightNorm},
    ),
    "outer_products": (
        partial(EGGROLL, lr=1e-2, rank=2, num_queries=3, weight_decay=0.1),
        {"precision": "bf16-true", "bad_step": 1},
    ),
    "in_chunks": (partial(ZOAdaMM, lr=1e-2, update_precision="low_byte"), {"precision": "bf16-true"}),
    "own_shards": (partial(MeZOAdam, lr=1e-2, estimator=OneSided()), {"own": True, "frozen": "0.up"}),
}
REFUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "perturbed in place": (partial(MeZO, lr=1e-2), {"unseen": True}),
    "offload_low_words": (partial(LOZO, lr=1e-2, offload_low_words=True), {"resample": SubspaceResampling()}),
    "`bases`": (partial(LOZO, lr=1e-2), {"resample": SubspaceResampling(bases=ActivationBases())}),
    "row_column": (partial(HiZOO, lr=1e-2, curvature="row_column"), {}),
    "Foreign": (partial(Foreign, defaults={"lr": 1e-2, "eps": 1e-3}), {}),
    "PerExample": (partial(MeZO, lr=1e-2, estimator=PerExample(), num_queries=8), {}),
    "align_queries": (partial(MeZO, lr=1e-2, num_queries=2, align_queries=True), {}),
    "micro_batch_size": (partial(MeZO, lr=1e-2), {"micro_batch_size": 2}),
    "optimizer is SGD": (None, {}),
    "`layers_name` is 'blocks'": (partial(MeZO, lr=1e-2), {"layers_name": "blocks"}),
    "net.head.weight are on the device 'meta'": (partial(MeZO, lr=1e-2), {"empty": True}),
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)
        self.gate = nn.Parameter(torch.ones(1))  # one row: a rank has none of it
        self.unused = nn.Parameter(torch.ones(2, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.gate.to(inputs.dtype) * self.down(torch.tanh(self.up(self.norm(inputs))))


class Network(nn.Module):
    """Tied embeddings around a stack of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("mask", torch.ones(WIDTH, dtype=torch.bool), persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.embedding(words)
        for layer in self.layers:
            hidden = layer(hidden)
        self.seen += 1
        return F.linear(hidden, self.embedding.weight)


class Head(nn.Module):
    """Is outside the network, so that all of it is on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WORDS))
        self.register_buffer("offset", torch.rand(WORDS))

    def forward(self, logits: Tensor) -> Tensor:
        return logits * self.scale + self.offset


class Module(L.LightningModule):
    def __init__(
        self,
        own: bool = False,
        frozen: str | None = None,
        bad_step: int | None = None,
        head: bool = False,
        exact: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        torch.manual_seed(0 if own else int(os.environ.get("LOCAL_RANK", 0)))  # other ranks are given those of rank 0
        self.net, self.own, self.bad_step, self.exact = Network(), own, bad_step, exact
        self.head = Head() if head else nn.Identity()
        for name, parameter in self.net.layers.named_parameters():
            parameter.requires_grad_(frozen is None or not name.startswith(frozen))

    def configure_model(self) -> None:
        if self.own and isinstance(self.trainer.strategy, ModelParallelStrategy):
            first, mesh = self.net.layers[0], self.trainer.strategy.device_mesh["data_parallel"]
            whole = first.state_dict()
            first.to("meta")  # as one that no host holds; it is filled below
            for layer in self.net.layers:  # only these; embeddings are whole on every rank
                fully_shard(layer, mesh=mesh)
            first.to_empty(device="cpu")
            set_model_state_dict(first, whole, options=StateDictOptions(full_state_dict=True))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        exact = {layer.gate: layer.gate.detach() for layer in self.net.layers if self.exact}
        super()._apply(*args, **kwargs)
        for parameter, values in exact.items():  # it stays float32, as routers of some networks do
            parameter.data = values
        return self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if batch_idx == self.bad_step and self.current_epoch == 0 and self.global_rank == self.trainer.world_size - 1:
            return loss * float("nan")
        return loss

    def loss(self, batch: Any) -> Tensor:
        words = (batch[0] * 10).long() % WORDS
        return F.cross_entropy(self.head(self.net(words[:, :-1])).flatten(0, 1).float(), words[:, 1:].flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> None:
        return None  # of its own: all parameters train


class Unseen(Module):
    """Reads parameters where torch's Python functions do not see it."""

    def loss(self, batch: Any) -> Tensor:
        with torch._C.DisableTorchFunction():
            return super().loss(batch)


class Empty(Module):
    """Has a weight without numbers."""

    def configure_model(self) -> None:
        self.net.head = nn.Linear(WIDTH, WORDS, bias=False, device="meta")


class Descending(Module):
    """Reads gradients."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class Begun(L.Callback):
    """Saves what a run is after two thirds of it, and, with updates pending, in the middle of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loads = 0  # of a checkpoint, while weights to train can still be added

    def on_load_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self.loads += not trainer.optimizers

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == STEPS // 2:
            trainer.save_checkpoint(f"{self.path}-middle.ckpt")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == EPOCHS - 2:
            trainer.save_checkpoint(f"{self.path}-begun.ckpt")


def train(name: str, run: str, ranks: int, strategy: Any, folder: Path, begun: str | None = None) -> None:
    """Trains, from the checkpoint of another run if `begun` names one, and writes what was left by each rank."""
    method, options = RUNS[name]
    module, recorder, ledger = Module(**options), Recorder(), KeepLedger(folder / f"{name}-{run}")
    beginning = Begun(folder / f"{name}-{run}")
    callbacks: list[Any] = [ZerothOrder(method, skip_nonfinite=True), recorder, ledger, beginning]
    if "blocks" in options:
        order = options.get("order", Cyclic)()
        callbacks.append(BlockCoordinateDescent(order, interval=1, patterns=options["blocks"]))
    if "resample" in options:
        callbacks.append(SubspaceResampling(interval=2, anchor=options["resample"]))
    if "probe" in options:
        callbacks.append(LearningRateProbe(num_steps=2, num_examples=4, noise=1e-4, total_steps=STEPS))
    trainer = make_trainer(
        ranks,
        callbacks,
        strategy,
        max_steps=STEPS,
        precision=options.get("precision", "32-true"),
        use_distributed_sampler=False,
        limit_val_batches=1,
        num_sanity_val_steps=1,
    )
    part = loader(trainer.global_rank, ranks, BATCHES * BATCH)
    nobody = patch.object(folding, "hook_between_steps", lambda *_: None) if "waits" in options else nullcontext()
    with nobody:  # looks between steps
        trainer.fit(module, part, part, ckpt_path=None if begun is None else folder / f"{name}-{begun}.ckpt")
    trainer.save_checkpoint(folder / f"{name}-{run}.ckpt")
    held = [parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in module.parameters()]
    left: dict[str, Any] = {
        "steps": recorder.steps,
        "loads": beginning.loads,
        "held": sum(tensor.numel() for tensor in held),
        "loss": trainer.callback_metrics["val/loss"],
    }
    if ledger.path is not None:
        base = Module(**options)
        left["replayed"] = [replay(ledger.path, base, method).sealed, base.state_dict()]
    torch.save(left, folder / f"{name}-{run}-{trainer.global_rank}.pt")


def refuse(folder: Path) -> None:
    """Runs that end before the first step."""
    refused = {}
    for name, (method, options) in REFUSED.items():
        made: type[Module] = Descending if method is None else Module
        made = Unseen if options.pop("unseen", False) else Empty if options.pop("empty", False) else made
        strategy = ZerothOrderFSDP(layers_name=options.pop("layers_name", None))
        callbacks = [options.pop("resample")] if "resample" in options else []
        if method is not None:
            callbacks.append(ZerothOrder(method, **options))
        trainer = make_trainer(2, callbacks, strategy)
        try:
            trainer.fit(made(), loader(0, 1))
        except Exception as error:
            refused[name] = [str(error), trainer.global_step]
    torch.save(refused, folder / f"refused-{trainer.global_rank}.pt")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def two() -> None:
        for name in RUNS:
            train(name, "ddp", 2, ZerothOrderDDP(), folder)
            # By name, beside which Lightning takes double precision
            train(name, "fsdp", 2, "zo_fsdp", folder)
            train(name, "fsdp-after-ddp", 2, "zo_fsdp", folder, "ddp-begun")
        for run, strategy in (("fsdp", ZerothOrderFSDP()), ("ddp", ZerothOrderDDP())):
            train("factors", f"{run}-after-middle", 2, strategy, folder, "ddp-middle")
        refuse(folder)
        end_process()

    def one() -> None:
        for name in RUNS:
            train(name, "one", 1, "auto", folder)
            train(name, "one-after-fsdp", 1, "auto", folder, "fsdp-begun")

    for ranks, do in ((2, two), (1, one)):
        codes = fork_ranks(ranks, do, folder / f"error-{ranks}", 200)
        if any(codes):
            raise SystemExit("\n".join(path.read_text() for path in folder.glob("error-*.txt")) or str(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
