"""Two ranks hold the same weights, and do what one does with the same batches."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import zolightning

# Run as a program by both ranks, and by one; writes what is left of each run. Rank r of 2 takes every second example.
SCRIPT = """
import os
import sys
from functools import partial

import lightning as L
import torch
from torch import nn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from zolightning.blocks import Bandit
from zolightning.callbacks import ActivationBases, BlockCoordinateDescent, KeepLedger, MomentumTransport
from zolightning.callbacks import SubspaceResampling, ZerothOrder
from zolightning.checkpoints.replay import replay
from zolightning.optim.estimators import OneSided
from zolightning.optim import LOZO, ZOMOPI, MeZO, MeZOAdam

folder, ranks = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
inputs = torch.randn(80, 4, generator=torch.Generator().manual_seed(1))
targets = inputs.sum(1, keepdim=True)
bad_target = targets[8 * 3 + 1].item()  # in batch 3, on rank 1 of 2
none = torch.cat([targets[1::2], targets[8 * 6 : 8 * 7]])


class Recorder(L.Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, *_):
        self.steps.append(vars(trainer.optimizers[0].record))
        self.model = type(trainer.strategy.model).__name__


class Module(L.LightningModule):
    def __init__(self, options):
        super().__init__()
        # Under "zo_ddp" the second rank starts elsewhere, and is given the weights of the first.
        torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)) if "strategy" in options else 0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 1))
        self.options = options

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        if batch_idx in self.options.get("none_steps", ()) and torch.isin(batch[1], self.options["none"]).all():
            return None
        errors = (self.net(inputs) - targets).float().square()[:, 0]
        if self.options.get("bad_step") == batch_idx:
            errors = torch.where(targets[:, 0] == bad_target, float("nan"), errors)
        if not self.options.get("weighted"):
            return errors.mean()
        counts = (inputs[:, 0].abs() * 5).long() + 1
        return {"loss": (errors * counts).sum() / counts.sum(), "num_terms": counts.sum()}

    def configure_optimizers(self):
        return None  # of its own: all parameters train


runs = {
    "plain": (partial(MeZO, lr=1e-2), {}),
    "losses_only": (partial(MeZO, lr=1e-2), {"strategy": "zo_ddp"}),
    "weighted": (partial(MeZO, lr=1e-2, momentum=0.5, normalize=True), {"weighted": True}),
    "micro_batches": (partial(MeZO, lr=1e-2), {"weighted": True, "micro_batch_size": 3}),
    "adam": (partial(MeZOAdam, lr=1e-2, estimator=OneSided(), num_queries=2), {}),
    "bf16": (partial(MeZO, lr=1e-2, weight_decay=0.1), {"precision": "bf16-true"}),
    "skipped": (partial(MeZO, lr=1e-2), {"bad_step": 3}),
    # Step 3 is skipped by rank 1 of 2, step 6 by both
    "none": (partial(MeZO, lr=1e-2), {"micro_batch_size": 1, "none_steps": (3, 6), "none": none}),
    "subspace": (partial(ZOMOPI, lr=1e-2, rank=2, power_rank=1, vector_lr=1e-3), {}),
    "blocks": (partial(MeZO, lr=1e-2, momentum=0.5), {"blocks": ["net.0", "net.1", "net.4"]}),
    "activations": (partial(LOZO, lr=1e-2, rank=2), {"bases": ActivationBases(examples="batch", refresh=True)}),
    "stacked": (partial(LOZO, lr=1e-2, num_queries=2, momentum=0.5), {"evaluations_per_forward": 4}),
}
with_others = ("subspace", "stacked", "blocks", "activations")
for name, (method, options) in runs.items():
    module, recorder = Module(options), Recorder()
    size, skip = options.get("micro_batch_size"), "bad_step" in options
    stack = options.get("evaluations_per_forward", 1)
    callback = ZerothOrder(method, micro_batch_size=size, skip_nonfinite=skip, evaluations_per_forward=stack)
    others = [SubspaceResampling(interval=4, anchor=1), MomentumTransport("project")]
    if "blocks" in options:
        others = [BlockCoordinateDescent(Bandit(step_size=0.5), interval=2, patterns=options["blocks"])]
    if "bases" in options:
        others = [SubspaceResampling(interval=4, bases=options["bases"])]
    ledger = KeepLedger(f"{folder}/{name}-of-{ranks}")
    trainer = L.Trainer(
        max_steps=10,
        accelerator="cpu",
        devices=ranks,
        strategy=options.get("strategy", "ddp") if ranks > 1 else "auto",
        precision=options.get("precision", "32-true"),
        callbacks=[callback, *(others if name in with_others else []), recorder, ledger],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    share = range(trainer.global_rank, 80, ranks)
    trainer.fit(module, DataLoader(TensorDataset(inputs, targets), batch_size=8 // ranks, sampler=share))
    left = {"weights": module.state_dict(), "steps": recorder.steps, "global_step": trainer.global_step}
    left["model"] = recorder.model
    if ledger.path is not None:
        base = Module({})  # as rank 0 began
        left["replayed"] = [replay(ledger.path, base, method).sealed, base.state_dict()]
    torch.save(left, f"{folder}/{name}-{trainer.global_rank}-of-{ranks}.pt")

if ranks > 1:  # without a zeroth-order method
    module = Module({})
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="zo_ddp", logger=False, enable_checkpointing=False)
    try:
        trainer.fit(module, DataLoader(TensorDataset(inputs, targets), batch_size=4))
    except MisconfigurationException as error:
        left = {"refused": str(error), "global_step": trainer.global_step}
        torch.save(left, f"{folder}/sgd-{trainer.global_rank}-of-2.pt")
"""

RUNS = [
    "plain",
    "losses_only",
    "weighted",
    "micro_batches",
    "adam",
    "bf16",
    "skipped",
    "none",
    "subspace",
    "activations",
    "stacked",
    "blocks",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, int], dict[str, Any]]:
    """What each run left on rank r of n, by (run, r, n)."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(SCRIPT)
    started_by_lightning = {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED"}
    environment = {name: value for name, value in os.environ.items() if name not in started_by_lightning}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(zolightning.__file__).parents[1])}
    for ranks in (2, 1):
        command = [sys.executable, str(folder / "script.py"), str(folder), str(ranks)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for path in folder.glob("*.pt"):
        name, rank, _, ranks = path.stem.rsplit("-", 3)
        found[name, int(rank), int(ranks)] = torch.load(path, weights_only=True)
    return found


@pytest.mark.parametrize("name", RUNS)
class TestTwoRanks:
    def test_hold_the_same_bits(self, results: dict, name: str) -> None:
        first, second = results[name, 0, 2], results[name, 1, 2]
        assert repr(first["steps"]) == repr(second["steps"]) and len(first["steps"]) == 10  # repr: nan is not nan
        for key, tensor in first["weights"].items():
            assert torch.equal(tensor, second["weights"][key]), key
        assert first["global_step"] == second["global_step"] == 10

    def test_write_one_ledger_that_replays_to_their_weights(self, results: dict, name: str) -> None:
        assert "replayed" not in results[name, 1, 2]
        if name == "activations":  # whose bases no record has
            assert "replayed" not in results[name, 0, 2]
            return
        sealed, weights = results[name, 0, 2]["replayed"]
        assert sealed
        for key, tensor in results[name, 1, 2]["weights"].items():
            assert torch.equal(tensor, weights[key]) or "running" in key or "batches" in key, key

    def test_do_what_one_does(self, results: dict, name: str) -> None:
        """Up to the order of sums.

        A loss of order 1 is a mean of fp32 numbers, good to 1e-6; over 2 eps = 2e-3 (or eps) that is up to 1e-3 in a
        projected gradient of order 1, and after ten steps of lr = 1e-2 up to 1e-4 in a weight. In bf16, a
        different last bit of one activation weighs as much as 2^-8 of it, so that only losses are compared.
        """
        both, one = results[name, 0, 2], results[name, 0, 1]
        for step, expected in zip(both["steps"], one["steps"], strict=True):
            assert {key: step[key] for key in ("step", "seed", "lr", "forward_passes")} == {
                key: expected[key] for key in ("step", "seed", "lr", "forward_passes")
            }
            rough = name == "bf16"
            assert step["losses"] == pytest.approx(expected["losses"], rel=0.02 if rough else 1e-4, nan_ok=True)
            assert len(step["projected_grads"]) == len(expected["projected_grads"])
            if not rough:
                assert step["projected_grads"] == pytest.approx(expected["projected_grads"], abs=5e-3)
        if name != "bf16":
            for key, tensor in both["weights"].items():
                torch.testing.assert_close(tensor, one["weights"][key], rtol=0, atol=5e-4, msg=key)


def test_a_batch_is_skipped_where_all_ranks_skip_it(results: dict) -> None:
    for rank, ranks in ((0, 2), (1, 2), (0, 1)):
        steps = results["none", rank, ranks]["steps"]
        assert [i for i, step in enumerate(steps) if not step["projected_grads"]] == [6]


def test_a_step_that_is_bad_on_one_rank_is_skipped_by_both(results: dict) -> None:
    for rank, ranks in ((0, 2), (1, 2), (0, 1)):
        steps = results["skipped", rank, ranks]["steps"]
        assert [i for i, step in enumerate(steps) if not step["projected_grads"]] == [3]


def test_zo_ddp_does_what_ddp_does_with_a_bare_module(results: dict) -> None:
    stock, bare = results["plain", 0, 2], results["losses_only", 0, 2]
    assert (stock["model"], bare["model"]) == ("DistributedDataParallel", "Module")
    assert stock["steps"] == bare["steps"]
    for key, tensor in stock["weights"].items():
        assert torch.equal(tensor, bare["weights"][key]), key


@pytest.mark.parametrize("rank", [0, 1])
def test_zo_ddp_refuses_an_optimizer_that_reads_gradients(results: dict, rank: int) -> None:
    refused = results["sgd", rank, 2]
    assert "no gradients are averaged, and the optimizer is SGD. Use 'ddp'" in refused["refused"]
    assert refused["global_step"] == 0
