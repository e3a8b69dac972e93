"""Program: runs of two ranks that are killed three times and go on with one; writes their hashes.

``python killed_ranks.py FOLDER`` writes ``hashes.json``: by strategy, SHA-256 of the trained weights and of replayed
ones.
"""

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from checkpoint_runs import Validated
from forked_ranks import fork_ranks
from zolightning.callbacks import KeepLedger, SaveLast, ZerothOrder
from zolightning.checkpoints.checkpoint_io import AtomicCheckpointIO
from zolightning.checkpoints.replay import replay
from zolightning.optim import MeZO
from zolightning.strategies import ZerothOrderDDP, ZerothOrderFSDP
from zolightning.weights_digest import weights_digest

STEPS, BATCH = 20, 8
WAIT = timedelta(seconds=30)
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: DDPStrategy(timeout=WAIT),
    "zo_ddp": lambda: ZerothOrderDDP(timeout=WAIT),
    "zo_ddp, signs shared": lambda: ZerothOrderDDP(timeout=WAIT, perturbation_parallel_size=2),
    "zo_ddp, queries shared": lambda: ZerothOrderDDP(timeout=WAIT, perturbation_parallel_size=2),
    "zo_fsdp": lambda: ZerothOrderFSDP(timeout=WAIT, layers_name="net"),
}


def method_of(strategy: str) -> Any:
    """One query, of which ranks can share the signs, or two."""
    return partial(MeZO, lr=1e-2, momentum=0.9, num_queries=2 if "queries" in strategy else 1)


def fit(folder: Path, strategy: str, ranks: int, kill: tuple[str, int, tuple[int, ...]] | None = None) -> None:
    """Begins a run or goes on with it; ranks that are named kill themselves in a step or a validation."""
    rank = int(os.environ["LOCAL_RANK"])
    parts = 1 if strategy.endswith("shared") else ranks
    inputs = torch.randn(48, 4, generator=torch.Generator().manual_seed(3))[rank % parts :: parts]
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    module = Validated()
    if kill is not None and rank in kill[2]:
        plan = module.in_step if kill[0] == "step" else module.in_validation
        plan.at[kill[1] if kill[0] == "step" else (kill[1], 0)] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    trainer = L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=ranks,
        strategy=STRATEGIES[strategy]() if ranks > 1 else "auto",
        logger=False,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            ZerothOrder(method_of(strategy)),
            KeepLedger(folder, folder / "ledger.bin"),
            SaveLast(folder, every_n_train_steps=4),
        ],
    )
    loaders = [StatefulDataLoader(data, batch_size=BATCH // parts) for _ in range(2)]
    trainer.fit(module, *loaders, ckpt_path="last" if (folder / "last.ckpt").exists() else None)
    digest = weights_digest(dict(module.named_parameters()))  # of weights that ranks share, by all of them
    if trainer.is_global_zero:
        (folder / f"{ranks}.txt").write_text(digest)


def replayed(ledger: Path, strategy: str, step: int) -> list[Any]:
    module = Validated()
    found = replay(ledger, module, method_of(strategy), step)
    return [weights_digest(dict(module.named_parameters())), found.sealed]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    hashes = {}
    for strategy in STRATEGIES:
        run, whole = folder / strategy / "killed", folder / strategy / "whole"
        run.mkdir(parents=True), whole.mkdir()
        codes = []
        for kill in (("step", 3, (0, 1)), ("step", 7, (0,)), ("validation", 12, (0, 1))):
            codes.append(fork_ranks(2, partial(fit, run, strategy, 2, kill), run / "error"))
        for ranks, where in ((1, run), (2, whole)):
            if any(fork_ranks(ranks, partial(fit, where, strategy, ranks), where / "error")):
                raise SystemExit("\n".join(path.read_text() for path in where.glob("error-*.txt")))
        ledgers = run / "ledger.bin", whole / "ledger.bin"
        hashes[strategy] = {
            "codes": codes,
            "trained": (run / "1.txt").read_text(),
            "replayed": replayed(ledgers[0], strategy, STEPS),
            "killed last": replayed(ledgers[0], strategy, 12)[0],
            "whole": (whole / "2.txt").read_text(),
            "whole at 12": replayed(ledgers[1], strategy, 12)[0],
        }
    (folder / "hashes.json").write_text(json.dumps(hashes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
